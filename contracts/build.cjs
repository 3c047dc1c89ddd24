// Compiles src/ with solc-js and writes one artifact per contract: node build.cjs OUTPUT_DIRECTORY
//
// An artifact holds abi, bytecode and deployedBytecode (with immutableReferences), keys sorted. Without
// metadata the bytecode depends on the sources, the compiler and the settings below only.
"use strict";

const fs = require("fs");
const path = require("path");
const solc = require("solc");

const CONTRACTS = ["MCC", "NodeRegistry", "JobEscrow"];

const OUTPUTS = [
  "abi",
  "evm.bytecode.object",
  "evm.deployedBytecode.object",
  "evm.deployedBytecode.immutableReferences",
];

const settings = {
  optimizer: { enabled: true, runs: 1000 },
  viaIR: true,
  evmVersion: "cancun",
  metadata: { bytecodeHash: "none", appendCBOR: false },
  outputSelection: Object.fromEntries(CONTRACTS.map((name) => [`src/${name}.sol`, { [name]: OUTPUTS }])),
};

function readImport(name) {
  const file = path.join(__dirname, name.startsWith("src/") ? name : path.join("node_modules", name));
  return fs.existsSync(file) ? { contents: fs.readFileSync(file, "utf8") } : { error: `no such file: ${name}` };
}

function sortKeys(value) {
  if (Array.isArray(value)) return value.map(sortKeys);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sortKeys(value[key])]));
}

// The compiler names immutables by node ids that change with unrelated sources; we count them in order.
function immutablesInOrder(references) {
  const spans = Object.values(references).sort((left, right) => left[0].start - right[0].start);
  return Object.fromEntries(spans.map((uses, index) => [`immutable${String(index).padStart(2, "0")}`, uses]));
}

function compile() {
  const sources = Object.fromEntries(CONTRACTS.map((name) => [`src/${name}.sol`, readImport(`src/${name}.sol`)]));
  const content = Object.fromEntries(Object.entries(sources).map(([name, s]) => [name, { content: s.contents }]));
  const input = JSON.stringify({ language: "Solidity", sources: content, settings });
  const output = JSON.parse(solc.compile(input, { import: readImport }));
  // Warnings about libraries are not ours to cure; one about our own sources fails the build.
  const ours = (problem) => problem.severity === "error" || problem.sourceLocation?.file.startsWith("src/");
  const problems = (output.errors ?? []).filter(ours);
  for (const problem of problems) console.error(problem.formattedMessage);
  if (problems.length > 0) process.exit(1);
  return output.contracts;
}

function main() {
  if (process.argv.length !== 3) {
    console.error("usage: node build.cjs OUTPUT_DIRECTORY");
    process.exit(2);
  }
  const directory = process.argv[2];
  const contracts = compile();
  fs.mkdirSync(directory, { recursive: true });
  for (const name of CONTRACTS) {
    const { abi, evm } = contracts[`src/${name}.sol`][name];
    const artifact = {
      abi,
      bytecode: `0x${evm.bytecode.object}`,
      contractName: name,
      deployedBytecode: {
        immutableReferences: immutablesInOrder(evm.deployedBytecode.immutableReferences),
        object: `0x${evm.deployedBytecode.object}`,
      },
    };
    fs.writeFileSync(path.join(directory, `${name}.json`), JSON.stringify(sortKeys(artifact), null, 1) + "\n");
    console.log(`${name}: ${evm.deployedBytecode.object.length / 2} bytes deployed`);
  }
}

main();
