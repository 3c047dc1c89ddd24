// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow as E} from "../src/IJobEscrow.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {Deploy} from "./support/Deploy.sol";
import {StartedJob} from "./support/StartedJob.sol";
import {Vm, vm} from "./support/Vm.sol";

/// @notice Settlements: who signs them, what is anchored and when, and the court's void.
contract JobEscrowAnchorTest is StartedJob {
    // ------------------------------------------------------------------ who signs

    function test_aQuorumInAnyPairAnchors() public {
        uint256[4] memory bitmaps = [uint256(3), 5, 6, 7];
        for (uint64 i; i < 4; ++i) {
            E.Settlement memory settlement = settlementAt(i + 1, bytes32(uint256(i + 1)), 0);
            escrow.anchor(settlement, committee, bitmaps[i], sign(settlement, committee, bitmaps[i]));
            assertEq(escrow.job(jobId).lastEpoch, i + 1, "anchored");
            pass(WINDOW);
        }
    }

    function test_oneSignatureShortOfTheQuorumIsRefused() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        _expectRefused(settlement, 1, sign(settlement, committee, 1), E.JobEscrowQuorumNotReached.selector);
        _expectRefused(settlement, 0, "", E.JobEscrowQuorumNotReached.selector);
    }

    function test_oneSignerDoesNotCountTwice() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        bytes memory one = sign(settlement, committee, 1);
        _expectRefused(settlement, 3, bytes.concat(one, one), E.JobEscrowInvalidSignature.selector);
        _expectRefused(settlement, 1, bytes.concat(one, one), E.JobEscrowInvalidSignerBitmap.selector);
        address[] memory doubled = new address[](3);
        (doubled[0], doubled[1], doubled[2]) = (committee[0], committee[0], committee[1]);
        bytes memory signatures = bytes.concat(one, one);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongCommittee.selector, jobId));
        escrow.anchor(settlement, doubled, 3, signatures);
    }

    function test_signaturesAreInCommitteeOrder() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        bytes memory swapped = bytes.concat(sign(settlement, committee, 2), sign(settlement, committee, 1));
        _expectRefused(settlement, 3, swapped, E.JobEscrowInvalidSignature.selector);
    }

    function test_signaturesMustMatchTheBitmap() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        bytes memory two = sign(settlement, committee, 3);
        _expectRefused(settlement, 7, two, E.JobEscrowInvalidSignature.selector);
        _expectRefused(settlement, 3, bytes.concat(two, hex"00"), E.JobEscrowInvalidSignerBitmap.selector);
        _expectRefused(settlement, 3 + 8, two, E.JobEscrowInvalidSignerBitmap.selector);
        _expectRefused(settlement, 3, hex"", E.JobEscrowInvalidSignature.selector);
        two[129] = 0x1d; // a recovery id that does not exist
        _expectRefused(settlement, 3, two, E.JobEscrowInvalidSignature.selector);
    }

    function test_aStrangerIsNoMember() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        bytes32 digest = escrow.settlementDigest(settlement);
        bytes memory signatures = bytes.concat(sign(settlement, committee, 1), signatureOf(1005, digest));
        _expectRefused(settlement, 3, signatures, E.JobEscrowInvalidSignature.selector);
    }

    function test_aMalleableSignatureIsRefused() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(keyOf[committee[1]], escrow.settlementDigest(settlement));
        bytes memory high = abi.encodePacked(r, bytes32(ORDER - uint256(s)), v == 27 ? uint8(28) : uint8(27));
        bytes memory signatures = bytes.concat(sign(settlement, committee, 1), high);
        _expectRefused(settlement, 3, signatures, E.JobEscrowInvalidSignature.selector);
    }

    function test_everyFieldIsSigned() public {
        for (uint256 field; field < 9; ++field) {
            E.Settlement memory settlement = settlementAt(1, SPEC, 1);
            bytes memory signatures = sign(settlement, committee, 3);
            if (field == 0) settlement.epoch = 2;
            if (field == 1) settlement.prevRoot = SALT;
            if (field == 2) settlement.root = SALT;
            if (field == 3) settlement.total = 2;
            if (field == 4) settlement.receipts = 2;
            if (field == 5) settlement.logSeq = 2;
            if (field == 6) settlement.logHead = SALT;
            if (field == 7) settlement.dataHash = SALT;
            if (field == 8) settlement.isFinal = true;
            _expectRefused(settlement, 3, signatures, E.JobEscrowInvalidSignature.selector);
        }
    }

    function test_aSettlementOfAnotherChainIsRefused() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        bytes memory signatures = sign(settlement, committee, 3);
        vm.chainId(block.chainid + 1);
        _expectRefused(settlement, 3, signatures, E.JobEscrowInvalidSignature.selector);
    }

    function test_aSettlementOfAnotherContractIsRefused() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        bytes memory here = sign(settlement, committee, 3);
        (JobEscrow first, E.Settlement memory original) = (escrow, settlement);
        escrow = Deploy.jobEscrow(mcc, registry);
        bytes memory there = sign(settlement, committee, 3);
        escrow = first;
        _expectRefused(original, 3, there, E.JobEscrowInvalidSignature.selector);
        escrow.anchor(original, committee, 3, here);
    }

    function test_aSettlementOfAnotherJobIsRefused() public {
        (bytes32 other, address[] memory otherCommittee) = openAndStart("other");
        E.Settlement memory settlement = settlementOf(other, 1, SPEC, 0, false);
        bytes memory signatures = sign(settlement, otherCommittee, 3);
        settlement.jobId = jobId;
        bytes4 selector = keccak256(abi.encode(otherCommittee)) == keccak256(abi.encode(committee))
            ? E.JobEscrowInvalidSignature.selector
            : E.JobEscrowWrongCommittee.selector;
        vm.expectPartialRevert(selector);
        escrow.anchor(settlement, otherCommittee, 3, signatures);
    }

    function test_thereIsOneCommitteeTerm() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 0);
        settlement.committeeTerm = 1;
        bytes memory signatures = sign(settlement, committee, 3);
        _expectRefused(settlement, 3, signatures, E.JobEscrowWrongCommitteeTerm.selector);
    }

    // ------------------------------------------------------------------ what is anchored, and when

    function test_anybodyAnchorsAndAllFieldsAreInTheEvent() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 9);
        bytes memory signatures = sign(settlement, committee, 5);
        bytes memory data = bytes.concat(
            abi.encode(0, bytes32(0), 9, 7, 11, keccak256("log head"), keccak256("data"), false, 5),
            abi.encode(vm.getBlockTimestamp() + WINDOW)
        );
        vm.recordLogs();
        vm.prank(stranger);
        escrow.anchor(settlement, committee, 5, signatures);
        Vm.Log memory log = vm.getRecordedLogs()[0];
        assertEq(log.topics[0], E.Anchored.selector, "event");
        assertEq(log.topics[1], jobId, "job");
        assertEq(uint256(log.topics[2]), 1, "epoch");
        assertEq(log.topics[3], SPEC, "root");
        assertEq(keccak256(log.data), keccak256(data), "fields");
    }

    function test_theSameAnchorAgainChangesNothing() public {
        E.Settlement memory settlement = settlementAt(1, SPEC, 9);
        anchor(settlement, committee);
        pass(WINDOW - 1);
        bytes32 before = keccak256(abi.encode(escrow.job(jobId)));
        vm.recordLogs();
        anchor(settlement, committee);
        assertEq(vm.getRecordedLogs().length, 0, "events");
        assertEq(keccak256(abi.encode(escrow.job(jobId))), before, "the window is not restarted");
        pass(1);
        anchor(settlementAt(2, SALT, 10), committee);
        anchor(settlement, committee);
        assertEq(escrow.job(jobId).lastEpoch, 2, "nor is a later one undone");
    }

    function test_aDifferentSettlementOfTheSameEpochIsRefused() public {
        anchor(settlementAt(1, SPEC, 9), committee);
        pass(WINDOW);
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowEpochNotIncreasing.selector, 1, 1);
        expectAnchorRevert(settlementAt(1, SALT, 9), committee, refusal);
        expectAnchorRevert(settlementAt(1, SPEC, 10), committee, refusal);
        expectAnchorRevert(settlementOf(jobId, 1, SPEC, 9, true), committee, refusal);
        expectAnchorRevert(
            settlementAt(0, SALT, 9), committee, abi.encodeWithSelector(E.JobEscrowEpochNotIncreasing.selector, 0, 1)
        );
    }

    function test_noNewRootWhileOneIsInItsWindow() public {
        anchor(settlementAt(1, SPEC, 9), committee);
        uint256 claimableAt = vm.getBlockTimestamp() + WINDOW;
        E.Settlement memory next = settlementAt(2, SALT, 10);
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowWindowOpen.selector, claimableAt);
        expectAnchorRevert(next, committee, refusal);
        vm.warp(claimableAt - 1);
        expectAnchorRevert(next, committee, refusal);
        vm.warp(claimableAt);
        anchor(next, committee);
    }

    function test_epochsMayBeLeftOut() public {
        anchor(settlementAt(3, SPEC, 1), committee);
        pass(WINDOW);
        anchor(settlementAt(type(uint64).max, SALT, 2), committee);
        assertEq(escrow.job(jobId).lastEpoch, type(uint64).max, "epoch");
    }

    function test_totalsNeverFall() public {
        anchor(settlementAt(1, SPEC, 9), committee);
        pass(WINDOW);
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowTotalDecreased.selector, 8, 9);
        expectAnchorRevert(settlementAt(2, SALT, 8), committee, refusal);
        anchor(settlementAt(2, SALT, 9), committee);
    }

    function test_anAnchorRaisesTheTotalByTheEpochLimitAtMost() public {
        bytes memory refusal =
            abi.encodeWithSelector(E.JobEscrowEpochLimitExceeded.selector, EPOCH_LIMIT + 1, EPOCH_LIMIT);
        expectAnchorRevert(settlementAt(1, SPEC, EPOCH_LIMIT + 1), committee, refusal);
        anchor(settlementAt(1, SPEC, EPOCH_LIMIT), committee);
        pass(WINDOW);
        expectAnchorRevert(settlementAt(2, SALT, 2 * EPOCH_LIMIT + 1), committee, refusal);
        anchor(settlementAt(2, SALT, 2 * EPOCH_LIMIT), committee);
    }

    function test_totalsNeverExceedThePot() public {
        for (uint64 epoch = 1; epoch <= 2; ++epoch) {
            anchor(settlementAt(epoch, bytes32(uint256(epoch)), epoch * EPOCH_LIMIT), committee);
            pass(WINDOW);
        }
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowPotExceeded.selector, POT + 1, POT);
        expectAnchorRevert(settlementAt(3, SPEC, POT + 1), committee, refusal);
        anchor(settlementAt(3, SPEC, POT), committee);
    }

    function test_aZeroRootIsRefused() public {
        expectAnchorRevert(settlementAt(1, 0, 0), committee, abi.encodeWithSelector(E.JobEscrowZeroRoot.selector));
    }

    function test_nothingIsAnchoredBeforeTheStart() public {
        bytes32 other = open("other");
        expectAnchorRevert(
            settlementOf(other, 1, SPEC, 0, false),
            committee,
            abi.encodeWithSelector(E.JobEscrowWrongCommittee.selector, other)
        );
    }

    function test_nothingIsAnchoredAfterAFinalSettlement() public {
        anchor(settlementOf(jobId, 1, SPEC, 9, true), committee);
        pass(WINDOW);
        expectAnchorRevert(
            settlementAt(2, SALT, 10), committee, abi.encodeWithSelector(E.JobEscrowFinalised.selector, jobId)
        );
    }

    function test_anchoringEndsWithTheSettleDeadline() public {
        uint256 deadline = escrow.job(jobId).settleDeadline;
        vm.warp(deadline + 1);
        expectAnchorRevert(
            settlementAt(1, SPEC, 1),
            committee,
            abi.encodeWithSelector(E.JobEscrowAnchorDeadlinePassed.selector, deadline)
        );
        vm.warp(deadline);
        anchor(settlementAt(1, SPEC, 1), committee);
    }

    function test_aStaleRootInTheLastSecondDoesNotShutOutTheFinalOne() public {
        Earning[] memory stale = list(earning(alice, 1e18));
        Earning[] memory full = list(earning(alice, 5e18), earning(bob, 7e18));
        vm.warp(escrow.job(jobId).settleDeadline);
        anchorEarnings(jobId, committee, 1, stale, false);
        pass(WINDOW + 1); // the settle deadline has passed, and the stale root has survived
        uint256 deadline = vm.getBlockTimestamp() - 1 + WINDOW;
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNotRefundable.selector, deadline));
        escrow.refund(jobId);
        vm.warp(deadline);
        anchorEarnings(jobId, committee, 2, full, true);
        pass(WINDOW);
        claim(claimOf(jobId, 2, full, 0));
        claim(claimOf(jobId, 2, full, 1));
        escrow.refund(jobId);
        assertEq(mcc.balanceOf(bob), 7e18, "bob");
        assertExact(jobId, 0);
    }

    // ------------------------------------------------------------------ void

    function test_onlyTheCourtVoidsARoot() public {
        anchor(settlementAt(1, SPEC, 1), committee);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowUnauthorized.selector, address(this)));
        escrow.voidRoot(jobId);
    }

    function test_aVoidRootFallsBackToTheOneBefore() public {
        Earning[] memory honest = list(earning(alice, 3e18), earning(bob, 2e18));
        Earning[] memory forged = list(earning(carol, 300e18));
        _appointCourtInTime();
        anchorEarnings(jobId, committee, 1, honest, false);
        pass(WINDOW);
        anchorEarnings(jobId, committee, 2, forged, true);
        _void();
        E.JobView memory job = escrow.job(jobId);
        assertEq(job.anchoredTotal, 5e18, "total");
        assertTrue(!job.isFinal, "not final");
        pass(WINDOW);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowUnknownRoot.selector, jobId, 2));
        claim(claimOf(jobId, 2, forged, 0));
        assertEq(claim(claimOf(jobId, 1, honest, 0)), 3e18, "the one before stands");
        anchorEarnings(jobId, committee, 3, honest, true);
        pass(WINDOW);
        escrow.refund(jobId);
        claim(claimOf(jobId, 3, honest, 1));
        assertExact(jobId, 0);
    }

    function test_afterAVoidTheNextRootNeedNotWait() public {
        _appointCourtInTime();
        anchor(settlementAt(1, SPEC, 1), committee);
        _void();
        expectAnchorRevert(
            settlementAt(1, SPEC, 1), committee, abi.encodeWithSelector(E.JobEscrowEpochNotIncreasing.selector, 1, 1)
        );
        anchor(settlementAt(2, SPEC, 1), committee);
        assertEq(escrow.job(jobId).lastEpoch, 2, "anchored in the same second");
    }

    function test_aRootThatSurvivedItsWindowCannotBeVoided() public {
        _appointCourtInTime();
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowUnknownRoot.selector, jobId, 0);
        vm.expectRevert(refusal);
        _void();
        anchor(settlementAt(1, SPEC, 1), committee);
        pass(WINDOW);
        refusal = abi.encodeWithSelector(E.JobEscrowUnknownRoot.selector, jobId, 1);
        vm.expectRevert(refusal);
        _void();
    }

    // ------------------------------------------------------------------ steps

    function _expectRefused(E.Settlement memory settlement, uint256 bitmap, bytes memory signatures, bytes4 selector)
        private
    {
        vm.expectPartialRevert(selector);
        escrow.anchor(settlement, committee, bitmap, signatures);
    }

    /// @dev A court in power, and a job that began after its appointment.
    function _appointCourtInTime() private {
        appointCourt();
        (jobId, committee) = openAndStart("in time");
    }

    function _void() private {
        court.call(address(escrow), abi.encodeCall(JobEscrow.voidRoot, (jobId)));
    }
}
