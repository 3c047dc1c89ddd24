// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "../../src/IJobEscrow.sol";
import {Swarm} from "./Swarm.sol";

/// @notice A swarm of three validators, and a job that has just been started.
abstract contract StartedJob is Swarm {
    bytes32 internal jobId;
    address[] internal committee;

    function setUp() public {
        deploy();
        addValidators(3);
        (jobId, committee) = openAndStart(SALT);
    }

    function settlementAt(uint64 epoch, bytes32 root, uint256 total)
        internal
        view
        returns (IJobEscrow.Settlement memory)
    {
        return settlementOf(jobId, epoch, root, total, false);
    }

    function anchorAndPass(uint64 epoch, Earning[] memory earnings, bool isFinal) internal {
        anchorEarnings(jobId, committee, epoch, earnings, isFinal);
        pass(WINDOW);
    }
}
