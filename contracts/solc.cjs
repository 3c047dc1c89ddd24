#!/usr/bin/env node
// Stands in for the native solc that forge expects: npm's solc behind --version and --standard-json.
// Bytecode is generated for the tests only: what they test is deployed from the committed artifacts.
"use strict";

const fs = require("fs");
const solc = require("solc");

function withoutBytecodeOfSources(input) {
  const wanted = input.settings.outputSelection;
  const selectionOf = (name) => {
    const selection = { ...wanted["*"], ...wanted[name] };
    return name.startsWith("test/") ? selection : { "": selection[""] ?? [] };
  };
  const names = Object.keys(input.sources);
  input.settings.outputSelection = Object.fromEntries(names.map((name) => [name, selectionOf(name)]));
  return input;
}

function write(text) {
  // process.stdout.write would lose what a full pipe does not take before exit.
  const bytes = Buffer.from(text);
  for (let done = 0; done < bytes.length; ) {
    try {
      done += fs.writeSync(1, bytes, done);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
    }
  }
}

if (process.argv.includes("--version")) {
  const version = solc.version().replace("Emscripten.clang", "Linux.g++");
  write(`solc, the solidity compiler commandline interface\nVersion: ${version}\n`);
} else if (process.argv.includes("--standard-json")) {
  // forge sends every source with its content, so there is nothing to import.
  const input = JSON.parse(fs.readFileSync(0, "utf8"));
  write(solc.compile(JSON.stringify(withoutBytecodeOfSources(input))));
} else {
  console.error(`solc.cjs: only --version and --standard-json are supported, not: ${process.argv.slice(2).join(" ")}`);
  process.exit(1);
}
