// Runs the contract tests: node test.cjs test|snapshot
//
// Three steps: the committed artifacts are what src/ builds (the tests deploy them), forge's tests pass,
// and no gas figure has risen by more than one percent over gas-snapshot ("snapshot" writes it anew).
"use strict";

const { spawnSync } = require("node:child_process");
const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");

const ALLOWED_RISE = 1.01;
const ARTIFACTS = path.join(__dirname, "artifacts");
const SNAPSHOT = path.join(__dirname, "gas-snapshot");
const MEASURED = path.join(__dirname, "out", "gas");

function fail(message) {
  console.error(`test.cjs: ${message}`);
  process.exit(1);
}

function run(command, args) {
  const { status, error } = spawnSync(command, args, { cwd: __dirname, stdio: "inherit" });
  if (error) fail(`${command}: ${error.message}`);
  if (status !== 0) process.exit(status ?? 1);
}

function checkArtifacts() {
  const scratch = fs.mkdtempSync(path.join(os.tmpdir(), "meshd-contracts-"));
  try {
    run(process.execPath, [path.join(__dirname, "build.cjs"), scratch]);
    for (const file of fs.readdirSync(scratch)) {
      const committed = path.join(ARTIFACTS, file);
      const same =
        fs.existsSync(committed) && fs.readFileSync(path.join(scratch, file)).equals(fs.readFileSync(committed));
      if (!same) fail(`artifacts/${file} is not what src/ builds: run scripts/build-contracts first`);
    }
  } finally {
    fs.rmSync(scratch, { recursive: true });
  }
}

function measuredGas() {
  const all = {};
  for (const file of fs.readdirSync(MEASURED)) {
    Object.assign(all, JSON.parse(fs.readFileSync(path.join(MEASURED, file), "utf8")));
  }
  return Object.fromEntries(Object.keys(all).sort().map((name) => [name, Number(all[name])]));
}

function compareGas(measured) {
  const committed = JSON.parse(fs.readFileSync(SNAPSHOT, "utf8"));
  const names = new Set([...Object.keys(committed), ...Object.keys(measured)]);
  const problems = [];
  for (const name of names) {
    if (!(name in measured)) problems.push(`${name}: in gas-snapshot, but not measured`);
    else if (!(name in committed)) problems.push(`${name}: measured, but not in gas-snapshot`);
    else if (measured[name] > committed[name] * ALLOWED_RISE) {
      problems.push(`${name}: rose from ${committed[name]} to ${measured[name]}`);
    }
  }
  if (problems.length > 0) {
    fail(`gas:\n  ${problems.join("\n  ")}\nIf that is meant, run scripts/build-contracts --snapshot and say why.`);
  }
  console.log(`gas: ${names.size} figures, none above gas-snapshot by more than 1 %`);
}

function main() {
  const mode = process.argv[2];
  if (mode !== "test" && mode !== "snapshot") {
    console.error("usage: node test.cjs test|snapshot");
    process.exit(2);
  }
  const forge = path.join(__dirname, "node_modules", ".bin", "forge");
  if (!fs.existsSync(forge)) fail(`npm has no forge for ${os.platform()} on ${os.arch()}: run the tests elsewhere`);
  checkArtifacts();
  fs.rmSync(MEASURED, { recursive: true, force: true });
  run(forge, ["test", "--offline"]);
  const measured = measuredGas();
  if (mode === "snapshot") fs.writeFileSync(SNAPSHOT, JSON.stringify(measured, null, 1) + "\n");
  else compareGas(measured);
}

main();
