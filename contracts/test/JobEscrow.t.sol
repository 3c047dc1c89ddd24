// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow as E} from "../src/IJobEscrow.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {MCC} from "../src/MCC.sol";
import {Deploy} from "./support/Deploy.sol";
import {FeeToken} from "./support/Hostile.sol";
import {Swarm} from "./support/Swarm.sol";
import {vm} from "./support/Vm.sol";

/// @notice The life of a job up to its start: open, permit, committee, cancel.
contract JobEscrowTest is Swarm {
    function setUp() public {
        deploy();
        addValidators(3);
    }

    // ------------------------------------------------------------------ open

    function test_openTakesTheCapAndBurnsAHundredth() public {
        uint256 before = mcc.balanceOf(researcher);
        uint256 supply = mcc.totalSupply();
        bytes32 jobId = open(SALT);
        assertEq(jobId, keccak256(abi.encode(block.chainid, escrow, researcher, SPEC, SALT)), "jobId");
        assertEq(before - mcc.balanceOf(researcher), CAP, "deposit");
        assertEq(supply - mcc.totalSupply(), CAP / 100, "burnt");
        assertEq(mcc.balanceOf(address(escrow)), POT, "pot");
        E.JobView memory job = escrow.job(jobId);
        assertEq(uint256(job.status), uint256(E.Status.Open), "status");
        assertEq(job.researcher, researcher, "researcher");
        assertEq(job.openBlock, vm.getBlockNumber(), "block");
        assertExact(jobId, POT);
    }

    function test_theBurntPartIsRoundedUp() public {
        vm.startPrank(researcher);
        uint40 work = workDeadline();
        bytes32 jobId = escrow.open(SPEC, SALT, 2, 1, 1, work, work + 4);
        assertEq(escrow.job(jobId).burnt, 1, "of two units");
        jobId = escrow.open(SPEC, "other", 101, 1, 1, work, work + 4);
        assertEq(escrow.job(jobId).burnt, 2, "of a hundred and one");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowCapTooSmall.selector, 1));
        escrow.open(SPEC, "third", 1, 1, 1, work, work + 4);
    }

    function test_termsThatMakeNoSenseAreRefused() public {
        uint40 work = workDeadline();
        uint40 present = uint40(vm.getBlockTimestamp());
        vm.startPrank(researcher);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowCapTooSmall.selector, 0));
        escrow.open(SPEC, SALT, 0, 1, WINDOW, work, work + 20);
        vm.expectRevert(E.JobEscrowZeroEpochLimit.selector);
        escrow.open(SPEC, SALT, CAP, 0, WINDOW, work, work + 20);
        vm.expectRevert(E.JobEscrowZeroWindow.selector);
        escrow.open(SPEC, SALT, CAP, 1, 0, work, work + 20);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWorkDeadlinePassed.selector, present));
        escrow.open(SPEC, SALT, CAP, 1, WINDOW, present, work + 20);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowSettleDeadlineTooEarly.selector, work + 19, work + 20));
        escrow.open(SPEC, SALT, CAP, 1, WINDOW, work, work + 19);
        escrow.open(SPEC, SALT, CAP, 1, WINDOW, work, work + 20);
    }

    function test_aJobIsOpenedOnceEvenIfCancelled() public {
        bytes32 jobId = open(SALT);
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowJobExists.selector, jobId);
        uint40 work = workDeadline();
        vm.startPrank(researcher);
        vm.expectRevert(refusal);
        escrow.open(SPEC, SALT, CAP, EPOCH_LIMIT, WINDOW, work, work + 20);
        escrow.cancel(jobId);
        vm.expectRevert(refusal);
        escrow.open(SPEC, SALT, CAP, EPOCH_LIMIT, WINDOW, work, work + 20);
    }

    function test_aTokenThatKeepsAFeeCannotBeDeposited() public {
        FeeToken fee = new FeeToken();
        JobEscrow other = Deploy.jobEscrow(MCC(address(fee)), registry);
        fee.approve(address(other), type(uint256).max);
        uint40 work = workDeadline();
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowDepositMismatch.selector, CAP, CAP - CAP / 100));
        other.open(SPEC, SALT, CAP, EPOCH_LIMIT, WINDOW, work, work + 20);
    }

    function test_openWithPermitNeedsNoAllowance() public {
        _openWithPermit(false);
    }

    function test_aPermitThatSomebodySubmittedInFrontIsNoFailure() public {
        _openWithPermit(true);
    }

    function test_withoutAValidPermitOrAllowanceNothingOpens() public {
        vm.startPrank(researcher);
        mcc.approve(address(escrow), 0);
        uint40 work = workDeadline();
        vm.expectPartialRevert(bytes4(keccak256("ERC20InsufficientAllowance(address,uint256,uint256)")));
        escrow.openWithPermit(SPEC, SALT, CAP, EPOCH_LIMIT, WINDOW, work, work + 20, work, 27, SPEC, SALT);
    }

    // ------------------------------------------------------------------ start

    function test_aJobIsStartedFromTheThirdBlockToTheTwoHundredth() public {
        bytes32 early = open("early");
        bytes32 late = open("late");
        bytes32 tooLate = open("too late");
        uint256 opened = vm.getBlockNumber();
        vm.roll(opened + 2);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowStartTooEarly.selector, opened + 3));
        escrow.start(early);
        vm.roll(opened + 3);
        escrow.start(early);
        vm.roll(opened + 200);
        escrow.start(late);
        vm.roll(opened + 201);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowStartTooLate.selector, opened + 200));
        escrow.start(tooLate);
        vm.prank(researcher);
        escrow.cancel(tooLate);
        assertExact(tooLate, 0);
    }

    function test_anybodyStartsAJobAndTheCommitteeIsFixed() public {
        bytes32 jobId = open(SALT);
        passBlocks(3);
        vm.recordLogs();
        vm.prank(stranger);
        escrow.start(jobId);
        (address[] memory committee, uint256 quorum, bytes32 beacon) =
            abi.decode(vm.getRecordedLogs()[0].data, (address[], uint256, bytes32));
        assertEq(committee.length, 3, "members");
        assertEq(quorum, 2, "quorum");
        assertEq(beacon, blockhash(vm.getBlockNumber() - 1), "the block two after the opening");
        assertEq(escrow.committeeHash(jobId), keccak256(abi.encode(committee)), "hash");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, jobId, E.Status.Started));
        escrow.start(jobId);
    }

    function test_theCommitteeIsTheSameWheneverAndAfterWhateverTheJobIsStarted() public {
        for (uint256 key = 4; key <= 30; ++key) {
            addValidator(key, MINIMUM_STAKE);
        }
        passEpoch();
        bytes32 jobId = open(SALT);
        uint256 opened = vm.getBlockNumber();
        uint256 epoch = registry.epochOf(opened + 2);
        vm.roll(opened + 3);
        bytes32 seed = keccak256(abi.encode(blockhash(opened + 2), jobId));
        bytes32 expected = keccak256(abi.encode(registry.drawCommittee(seed, epoch, 21)));
        for (uint256 key = 10; key < 20; ++key) {
            vm.prank(vm.addr(key));
            registry.startUnbond(vm.addr(key), MINIMUM_STAKE);
            addValidator(key + 100, 10 * MINIMUM_STAKE);
        }
        vm.roll(opened + 200);
        address[] memory committee = start(jobId);
        assertEq(committee.length, 21, "at most 21");
        assertEq(escrow.committeeHash(jobId), expected, "grinding the set after the seed changes nothing");
    }

    function test_stakeOfTheSeedsEpochIsTooLateForTheDraw() public {
        vm.roll(1100);
        bytes32 jobId = open(SALT); // the seed is block 1102, its epoch began with 1100
        addValidator(77, 1000 * MINIMUM_STAKE);
        vm.roll(1106); // the newcomer is active by now
        address[] memory committee = start(jobId);
        assertEq(committee.length, 3, "members");
        for (uint256 i; i < 3; ++i) {
            assertTrue(committee[i] != vm.addr(77), "not the newcomer");
        }
    }

    function test_withoutAValidatorNothingStartsAndTheResearcherCancels() public {
        for (uint256 key = 1; key <= 3; ++key) {
            vm.prank(vm.addr(key));
            registry.startUnbond(vm.addr(key), MINIMUM_STAKE);
        }
        passEpoch();
        bytes32 jobId = open(SALT);
        passBlocks(3);
        vm.expectRevert(E.JobEscrowNoValidator.selector);
        escrow.start(jobId);
        vm.prank(researcher);
        escrow.cancel(jobId);
    }

    function test_aJobIsNotStartedAfterItsWorkDeadline() public {
        bytes32 jobId = open(SALT);
        bytes32 other = open("other");
        uint256 deadline = escrow.job(jobId).workDeadline;
        passBlocks(3);
        vm.warp(deadline - 1);
        escrow.start(other);
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWorkDeadlinePassed.selector, deadline));
        escrow.start(jobId);
    }

    function test_theQuorumIsTwoThirdsRoundedUp() public view {
        uint8[22] memory quorum =
            [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 10, 11, 12, 12, 13, 14, 14];
        for (uint256 n; n < quorum.length; ++n) {
            assertEq(escrow.quorumOf(n), quorum[n], "quorum");
        }
    }

    // ------------------------------------------------------------------ cancel

    function test_cancelReturnsAllButTheBurntPart() public {
        uint256 before = mcc.balanceOf(researcher);
        bytes32 jobId = open(SALT);
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowUnauthorized.selector, stranger));
        escrow.cancel(jobId);
        vm.startPrank(researcher);
        escrow.cancel(jobId);
        assertEq(before - mcc.balanceOf(researcher), CAP / 100, "cost");
        assertExact(jobId, 0);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, jobId, E.Status.Cancelled));
        escrow.cancel(jobId);
        passBlocks(3);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, jobId, E.Status.Cancelled));
        escrow.start(jobId);
        pass(1000);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, jobId, E.Status.Cancelled));
        escrow.refund(jobId);
    }

    function test_theStartEndsCancellation() public {
        (bytes32 jobId,) = openAndStart(SALT);
        vm.prank(researcher);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, jobId, E.Status.Started));
        escrow.cancel(jobId);
    }

    function test_aJobThatDoesNotExistCannotBeTouched() public {
        bytes32 jobId = keccak256("nothing");
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, jobId, E.Status.None);
        vm.expectRevert(refusal);
        escrow.start(jobId);
        vm.expectRevert(refusal);
        escrow.cancel(jobId);
        vm.expectRevert(refusal);
        escrow.refund(jobId);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongCommittee.selector, jobId));
        escrow.anchor(settlementOf(jobId, 1, SPEC, 0, false), new address[](0), 0, "");
    }

    // ------------------------------------------------------------------ steps

    function _openWithPermit(bool inFront) private {
        vm.prank(researcher);
        mcc.approve(address(escrow), 0);
        uint40 work = workDeadline();
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(1001, _permitDigest(work));
        if (inFront) {
            vm.prank(stranger);
            mcc.permit(researcher, address(escrow), CAP, work, v, r, s);
        }
        vm.prank(researcher);
        bytes32 jobId =
            escrow.openWithPermit(SPEC, SALT, CAP, EPOCH_LIMIT, WINDOW, work, work + 20, work, v, r, s);
        assertExact(jobId, POT);
        assertEq(mcc.allowance(researcher, address(escrow)), 0, "nothing left of the allowance");
    }

    function _permitDigest(uint256 deadline) private view returns (bytes32) {
        bytes32 typeHash =
            keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)");
        bytes32 inner = keccak256(abi.encode(typeHash, researcher, escrow, CAP, mcc.nonces(researcher), deadline));
        return keccak256(abi.encodePacked("\x19\x01", mcc.DOMAIN_SEPARATOR(), inner));
    }
}
