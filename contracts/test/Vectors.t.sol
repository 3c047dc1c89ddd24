// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {IJobEscrow} from "../src/IJobEscrow.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {Swarm} from "./support/Swarm.sol";
import {Tree} from "./support/Tree.sol";
import {vm} from "./support/Vm.sol";

/// @notice Digests and trees are those of Python and JavaScript: the vectors of tests/vectors.
contract VectorsTest is Swarm {
    function setUp() public {
        deploy();
    }

    function test_aSettlementsDigestIsPythons() public {
        string memory json = vm.readFile("../tests/vectors/messages.json");
        address at_ = vm.parseJsonAddress(json, ".escrow");
        vm.etch(at_, address(escrow).code);
        vm.chainId(vm.parseJsonUint(json, ".chainId"));
        JobEscrow there = JobEscrow(at_);
        for (uint256 i; i < 2; ++i) {
            string memory vector = string.concat(".messages.settlement.", i == 0 ? "typical" : "extreme");
            assertEq(
                there.settlementDigest(_settlement(json, string.concat(vector, ".fields."))),
                _word(json, string.concat(vector, ".digest")),
                vector
            );
        }
    }

    function test_treesOfClaimsAreTheJavaScriptLibrarys() public view {
        string memory json = vm.readFile("../tests/vectors/claims.json");
        uint8[8] memory sizes = [1, 2, 3, 4, 5, 7, 8, 21];
        for (uint256 i; i < sizes.length; ++i) {
            _checkTree(json, string.concat(".claims[", vm.toString(i), "]"), sizes[i]);
        }
    }

    function _checkTree(string memory json, string memory tree, uint256 size) private view {
        bytes32 root = vm.parseJsonBytes32(json, string.concat(tree, ".root"));
        bytes32[] memory leaves = new bytes32[](size);
        for (uint256 k; k < size; ++k) {
            string memory leaf = string.concat(tree, ".leaves[", vm.toString(k), "]");
            leaves[k] = escrow.leafOf(
                vm.parseJsonBytes32(json, string.concat(leaf, ".value[0]")),
                vm.parseJsonAddress(json, string.concat(leaf, ".value[1]")),
                vm.parseJsonUint(json, string.concat(leaf, ".value[2]")),
                vm.parseJsonBytes32(json, string.concat(leaf, ".value[3]"))
            );
            assertEq(leaves[k], vm.parseJsonBytes32(json, string.concat(leaf, ".leaf")), leaf);
            bytes32[] memory proof = vm.parseJsonBytes32Array(json, string.concat(leaf, ".proof"));
            assertTrue(MerkleProof.verify(proof, root, leaves[k]), leaf);
        }
        assertEq(Tree.build(leaves)[0], root, "the tests' own trees");
    }

    function _settlement(string memory json, string memory key)
        private
        pure
        returns (IJobEscrow.Settlement memory settlement)
    {
        settlement.jobId = _word(json, string.concat(key, "jobId"));
        settlement.committeeTerm = uint32(vm.parseJsonUint(json, string.concat(key, "committeeTerm")));
        settlement.epoch = uint64(vm.parseJsonUint(json, string.concat(key, "epoch")));
        settlement.prevRoot = _word(json, string.concat(key, "prevRoot"));
        settlement.root = _word(json, string.concat(key, "root"));
        settlement.total = vm.parseJsonUint(json, string.concat(key, "total"));
        settlement.receipts = uint64(vm.parseJsonUint(json, string.concat(key, "receipts")));
        settlement.logSeq = uint64(vm.parseJsonUint(json, string.concat(key, "logSeq")));
        settlement.logHead = _word(json, string.concat(key, "logHead"));
        settlement.dataHash = _word(json, string.concat(key, "dataHash"));
        settlement.isFinal = vm.parseJsonBool(json, string.concat(key, "isFinal"));
    }

    /// @dev These vectors write bytes without the prefix 0x.
    function _word(string memory json, string memory key) private pure returns (bytes32) {
        return vm.parseBytes32(string.concat("0x", vm.parseJsonString(json, key)));
    }
}
