// Writes claims.json: trees of claims and of receipts as @openzeppelin/merkle-tree makes them.
// Run from the repository's root, after npm ci in contracts/:
//   NODE_PATH=contracts/node_modules node tests/vectors/claims.cjs
const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const { StandardMerkleTree } = require("@openzeppelin/merkle-tree");

const hash = (text) => crypto.createHash("sha256").update(text).digest("hex");
const claim = (size, index) => [
  "0x" + hash(`job ${size}`),
  "0x" + hash(`account ${size} ${index}`).slice(0, 40),
  BigInt("0x" + hash(`earned ${size} ${index}`).slice(0, index % 3 === 0 ? 64 : 16)).toString(),
  "0x" + hash(`receipts ${size} ${index}`),
];

function describe(values, types) {
  const tree = StandardMerkleTree.of(values, types);
  const leaves = values.map((value, index) => ({
    value,
    leaf: tree.leafHash(value),
    proof: tree.getProof(index),
  }));
  return { root: tree.root, leaves };
}

const sizes = [1, 2, 3, 4, 5, 7, 8, 21];
const claims = sizes.map((size) =>
  describe(
    Array.from({ length: size }, (_, index) => claim(size, index)),
    ["bytes32", "address", "uint256", "bytes32"],
  ),
);
const receipts = sizes.map((size) =>
  describe(
    Array.from({ length: size }, (_, index) => ["0x" + hash(`receipt ${size} ${index}`)]),
    ["bytes32"],
  ),
);
fs.writeFileSync(
  path.join(__dirname, "claims.json"),
  JSON.stringify({ claims, receipts }, null, 1) + "\n",
);
