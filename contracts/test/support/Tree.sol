// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Hashes} from "@openzeppelin/contracts/utils/cryptography/Hashes.sol";

/// @notice Merkle trees in the layout of npm's `@openzeppelin/merkle-tree`: leaves sorted by hash and
/// stored from the end of an array of 2n - 1 nodes; the children of node i are 2i + 1 and 2i + 2.
library Tree {
    function build(bytes32[] memory leaves) internal pure returns (bytes32[] memory nodes) {
        uint256 count = leaves.length;
        nodes = new bytes32[](2 * count - 1);
        bytes32[] memory sorted = _sort(leaves);
        for (uint256 i; i < count; ++i) {
            nodes[2 * count - 2 - i] = sorted[i];
        }
        for (uint256 i = count - 1; i > 0; --i) {
            nodes[i - 1] = Hashes.commutativeKeccak256(nodes[2 * i - 1], nodes[2 * i]);
        }
    }

    function proof(bytes32[] memory nodes, bytes32 leaf) internal pure returns (bytes32[] memory path) {
        uint256 index = nodes.length / 2;
        while (nodes[index] != leaf) ++index;
        uint256 depth;
        for (uint256 i = index; i > 0; i = (i - 1) / 2) {
            ++depth;
        }
        path = new bytes32[](depth);
        for (uint256 i; i < depth; ++i) {
            path[i] = nodes[index % 2 == 1 ? index + 1 : index - 1];
            index = (index - 1) / 2;
        }
    }

    function _sort(bytes32[] memory leaves) private pure returns (bytes32[] memory sorted) {
        sorted = new bytes32[](leaves.length);
        for (uint256 i; i < leaves.length; ++i) {
            uint256 at_ = i;
            for (; at_ > 0 && sorted[at_ - 1] > leaves[i]; --at_) {
                sorted[at_] = sorted[at_ - 1];
            }
            sorted[at_] = leaves[i];
        }
    }
}
