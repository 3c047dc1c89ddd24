// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {JobEscrow} from "../../src/JobEscrow.sol";
import {MCC} from "../../src/MCC.sol";
import {NodeRegistry} from "../../src/NodeRegistry.sol";
import {vm} from "./Vm.sol";

/// @notice Deploys the committed artifacts, byte for byte what a network gets.
library Deploy {
    function mcc(address holder) internal returns (MCC) {
        return MCC(create("MCC", abi.encode(holder)));
    }

    function nodeRegistry(MCC token, uint256 epochBlocks, uint256 unbondingSeconds, uint256 minimumStake)
        internal
        returns (NodeRegistry)
    {
        return NodeRegistry(create("NodeRegistry", abi.encode(token, epochBlocks, unbondingSeconds, minimumStake)));
    }

    function jobEscrow(MCC token, NodeRegistry registry) internal returns (JobEscrow) {
        return JobEscrow(create("JobEscrow", abi.encode(token, registry)));
    }

    /// @dev Reverts with what the constructor reverts with.
    function create(string memory name, bytes memory arguments) internal returns (address deployed) {
        string memory artifact = vm.readFile(string.concat("artifacts/", name, ".json"));
        bytes memory code = bytes.concat(vm.parseJsonBytes(artifact, ".bytecode"), arguments);
        assembly ("memory-safe") {
            deployed := create(0, add(code, 32), mload(code))
            if iszero(deployed) {
                returndatacopy(0, 0, returndatasize())
                revert(0, returndatasize())
            }
        }
    }
}
