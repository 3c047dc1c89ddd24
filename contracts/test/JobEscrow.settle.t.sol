// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {JobEscrow as E} from "../src/JobEscrow.sol";
import {MCC} from "../src/MCC.sol";
import {NodeRegistry} from "../src/NodeRegistry.sol";
import {Deploy} from "./support/Deploy.sol";
import {ReentrantToken} from "./support/Hostile.sol";
import {Swarm} from "./support/Swarm.sol";
import {Vm, vm} from "./support/Vm.sol";

/// @notice The life of a job from its start on: anchor, claim, refund, and the court's void.
contract JobEscrowSettleTest is Swarm {
    bytes32 private jobId;
    address[] private committee;

    function setUp() public {
        deploy();
        addValidators(3);
        (jobId, committee) = openAndStart(SALT);
    }

    // ------------------------------------------------------------------ who signs

    function test_aQuorumInAnyPairAnchors() public {
        uint256[4] memory bitmaps = [uint256(3), 5, 6, 7];
        for (uint64 i; i < 4; ++i) {
            E.Settlement memory settlement = _settlement(i + 1, bytes32(uint256(i + 1)), 0);
            escrow.anchor(settlement, committee, bitmaps[i], sign(settlement, committee, bitmaps[i]));
            assertEq(escrow.job(jobId).lastEpoch, i + 1, "anchored");
            pass(WINDOW);
        }
    }

    function test_oneSignatureShortOfTheQuorumIsRefused() public {
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        _expectRefused(settlement, 1, sign(settlement, committee, 1), E.JobEscrowQuorumNotReached.selector);
        _expectRefused(settlement, 0, "", E.JobEscrowQuorumNotReached.selector);
    }

    function test_oneSignerDoesNotCountTwice() public {
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
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
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        bytes memory swapped = bytes.concat(sign(settlement, committee, 2), sign(settlement, committee, 1));
        _expectRefused(settlement, 3, swapped, E.JobEscrowInvalidSignature.selector);
    }

    function test_signaturesMustMatchTheBitmap() public {
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        bytes memory two = sign(settlement, committee, 3);
        _expectRefused(settlement, 7, two, E.JobEscrowInvalidSignature.selector);
        _expectRefused(settlement, 3, bytes.concat(two, hex"00"), E.JobEscrowInvalidSignerBitmap.selector);
        _expectRefused(settlement, 3 + 8, two, E.JobEscrowInvalidSignerBitmap.selector);
        _expectRefused(settlement, 3, hex"", E.JobEscrowInvalidSignature.selector);
        two[129] = 0x1d; // a recovery id that does not exist
        _expectRefused(settlement, 3, two, E.JobEscrowInvalidSignature.selector);
    }

    function test_aStrangerIsNoMember() public {
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        bytes32 digest = escrow.settlementDigest(settlement);
        bytes memory signatures = bytes.concat(sign(settlement, committee, 1), signatureOf(1005, digest));
        _expectRefused(settlement, 3, signatures, E.JobEscrowInvalidSignature.selector);
    }

    function test_aMalleableSignatureIsRefused() public {
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(keyOf[committee[1]], escrow.settlementDigest(settlement));
        bytes memory high = abi.encodePacked(r, bytes32(ORDER - uint256(s)), v == 27 ? uint8(28) : uint8(27));
        bytes memory signatures = bytes.concat(sign(settlement, committee, 1), high);
        _expectRefused(settlement, 3, signatures, E.JobEscrowInvalidSignature.selector);
    }

    function test_everyFieldIsSigned() public {
        for (uint256 field; field < 9; ++field) {
            E.Settlement memory settlement = _settlement(1, SPEC, 1);
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
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        bytes memory signatures = sign(settlement, committee, 3);
        vm.chainId(block.chainid + 1);
        _expectRefused(settlement, 3, signatures, E.JobEscrowInvalidSignature.selector);
    }

    function test_aSettlementOfAnotherContractIsRefused() public {
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        bytes memory here = sign(settlement, committee, 3);
        (E first, E.Settlement memory original) = (escrow, settlement);
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
        E.Settlement memory settlement = _settlement(1, SPEC, 0);
        settlement.committeeTerm = 1;
        bytes memory signatures = sign(settlement, committee, 3);
        _expectRefused(settlement, 3, signatures, E.JobEscrowWrongCommitteeTerm.selector);
    }

    // ------------------------------------------------------------------ what is anchored, and when

    function test_anybodyAnchorsAndAllFieldsAreInTheEvent() public {
        E.Settlement memory settlement = _settlement(1, SPEC, 9);
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
        E.Settlement memory settlement = _settlement(1, SPEC, 9);
        anchor(settlement, committee);
        pass(WINDOW - 1);
        bytes32 before = keccak256(abi.encode(escrow.job(jobId)));
        vm.recordLogs();
        anchor(settlement, committee);
        assertEq(vm.getRecordedLogs().length, 0, "events");
        assertEq(keccak256(abi.encode(escrow.job(jobId))), before, "the window is not restarted");
        pass(1);
        anchor(_settlement(2, SALT, 10), committee);
        anchor(settlement, committee);
        assertEq(escrow.job(jobId).lastEpoch, 2, "nor is a later one undone");
    }

    function test_aDifferentSettlementOfTheSameEpochIsRefused() public {
        anchor(_settlement(1, SPEC, 9), committee);
        pass(WINDOW);
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowEpochNotIncreasing.selector, 1, 1);
        expectAnchorRevert(_settlement(1, SALT, 9), committee, refusal);
        expectAnchorRevert(_settlement(1, SPEC, 10), committee, refusal);
        expectAnchorRevert(settlementOf(jobId, 1, SPEC, 9, true), committee, refusal);
        expectAnchorRevert(
            _settlement(0, SALT, 9), committee, abi.encodeWithSelector(E.JobEscrowEpochNotIncreasing.selector, 0, 1)
        );
    }

    function test_noNewRootWhileOneIsInItsWindow() public {
        anchor(_settlement(1, SPEC, 9), committee);
        uint256 claimableAt = vm.getBlockTimestamp() + WINDOW;
        E.Settlement memory next = _settlement(2, SALT, 10);
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowWindowOpen.selector, claimableAt);
        expectAnchorRevert(next, committee, refusal);
        vm.warp(claimableAt - 1);
        expectAnchorRevert(next, committee, refusal);
        vm.warp(claimableAt);
        anchor(next, committee);
    }

    function test_epochsMayBeLeftOut() public {
        anchor(_settlement(3, SPEC, 1), committee);
        pass(WINDOW);
        anchor(_settlement(type(uint64).max, SALT, 2), committee);
        assertEq(escrow.job(jobId).lastEpoch, type(uint64).max, "epoch");
    }

    function test_totalsNeverFall() public {
        anchor(_settlement(1, SPEC, 9), committee);
        pass(WINDOW);
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowTotalDecreased.selector, 8, 9);
        expectAnchorRevert(_settlement(2, SALT, 8), committee, refusal);
        anchor(_settlement(2, SALT, 9), committee);
    }

    function test_anAnchorRaisesTheTotalByTheEpochLimitAtMost() public {
        bytes memory refusal =
            abi.encodeWithSelector(E.JobEscrowEpochLimitExceeded.selector, EPOCH_LIMIT + 1, EPOCH_LIMIT);
        expectAnchorRevert(_settlement(1, SPEC, EPOCH_LIMIT + 1), committee, refusal);
        anchor(_settlement(1, SPEC, EPOCH_LIMIT), committee);
        pass(WINDOW);
        expectAnchorRevert(_settlement(2, SALT, 2 * EPOCH_LIMIT + 1), committee, refusal);
        anchor(_settlement(2, SALT, 2 * EPOCH_LIMIT), committee);
    }

    function test_totalsNeverExceedThePot() public {
        for (uint64 epoch = 1; epoch <= 2; ++epoch) {
            anchor(_settlement(epoch, bytes32(uint256(epoch)), epoch * EPOCH_LIMIT), committee);
            pass(WINDOW);
        }
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowPotExceeded.selector, POT + 1, POT);
        expectAnchorRevert(_settlement(3, SPEC, POT + 1), committee, refusal);
        anchor(_settlement(3, SPEC, POT), committee);
    }

    function test_aZeroRootIsRefused() public {
        expectAnchorRevert(_settlement(1, 0, 0), committee, abi.encodeWithSelector(E.JobEscrowZeroRoot.selector));
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
            _settlement(2, SALT, 10), committee, abi.encodeWithSelector(E.JobEscrowFinalised.selector, jobId)
        );
    }

    function test_anchoringEndsWithTheSettleDeadline() public {
        uint256 deadline = escrow.job(jobId).settleDeadline;
        vm.warp(deadline + 1);
        expectAnchorRevert(
            _settlement(1, SPEC, 1),
            committee,
            abi.encodeWithSelector(E.JobEscrowAnchorDeadlinePassed.selector, deadline)
        );
        vm.warp(deadline);
        anchor(_settlement(1, SPEC, 1), committee);
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

    // ------------------------------------------------------------------ claim

    function test_aClaimIsPaidFromTheEndOfTheWindowOn() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        anchorEarnings(jobId, committee, 1, earnings, false);
        uint256 claimableAt = vm.getBlockTimestamp() + WINDOW;
        E.Claim memory one = claimOf(jobId, 1, earnings, 0);
        vm.warp(claimableAt - 1);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWindowOpen.selector, claimableAt));
        claim(one);
        (, bool claimable) = escrow.rootOf(jobId, 1);
        assertTrue(!claimable, "not yet");
        vm.warp(claimableAt);
        (, claimable) = escrow.rootOf(jobId, 1);
        assertTrue(claimable, "now");
        vm.prank(stranger);
        assertEq(claim(one), 3e18, "amount");
        assertEq(mcc.balanceOf(alice), 3e18, "paid to the account, whoever calls");
        assertEq(mcc.balanceOf(stranger), 0, "not to the caller");
    }

    function test_aClaimIsPaidOnce() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        _anchorAndPass(1, earnings, false);
        E.Claim memory one = claimOf(jobId, 1, earnings, 0);
        claim(one);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNothingToClaim.selector, jobId, alice));
        claim(one);
        E.Claim[] memory twice = new E.Claim[](2);
        (twice[0], twice[1]) = (one, one);
        assertEq(escrow.claimMany(twice), 0, "claimMany passes over what is paid");
        assertEq(mcc.balanceOf(alice), 3e18, "once");
    }

    function test_aLaterRootPaysTheDifference() public {
        Earning[] memory first = list(earning(alice, 3e18), earning(bob, 2e18));
        Earning[] memory second = list(earning(alice, 4e18), earning(bob, 2e18));
        _anchorAndPass(1, first, false);
        claim(claimOf(jobId, 1, first, 0));
        _anchorAndPass(2, second, false);
        assertEq(claim(claimOf(jobId, 2, second, 0)), 1e18, "difference");
        assertEq(claim(claimOf(jobId, 2, second, 1)), 2e18, "all at once");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNothingToClaim.selector, jobId, bob));
        claim(claimOf(jobId, 1, first, 1));
        assertEq(escrow.claimed(jobId, alice), 4e18, "claimed");
    }

    function test_aForgedClaimIsRefused() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18), earning(carol, 1e18));
        _anchorAndPass(1, earnings, false);
        E.Claim memory genuine = claimOf(jobId, 1, earnings, 0);
        for (uint256 lie; lie < 5; ++lie) {
            E.Claim memory one = claimOf(jobId, 1, earnings, 0);
            if (lie == 0) one.earned += 1;
            if (lie == 1) one.account = stranger;
            if (lie == 2) one.receiptsRoot = SPEC;
            if (lie == 3) one.proof = new bytes32[](0);
            if (lie == 4) one.proof[0] = SPEC;
            vm.expectRevert(abi.encodeWithSelector(E.JobEscrowInvalidProof.selector, jobId, one.account));
            claim(one);
        }
        claim(genuine);
    }

    function test_aNodeOfTheTreeIsNoLeaf() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        bytes32[] memory tree = treeOf(jobId, earnings);
        assertEq(tree[0], keccak256(abi.encode(_min(tree[1], tree[2]), _max(tree[1], tree[2]))), "root");
        assertTrue(tree[0] != escrow.leafOf(tree[1], address(uint160(uint256(tree[2]))), 0, 0), "double hash");
        assertEq(escrow.leafOf(jobId, alice, 3e18, receiptsRootOf(alice)), leafOf(jobId, earnings[0]), "leaf");
    }

    function test_aProofOfAnotherJobOrEpochIsRefused() public {
        (bytes32 other, address[] memory otherCommittee) = openAndStart("other");
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        _anchorAndPass(1, earnings, false);
        anchorEarnings(other, otherCommittee, 1, list(earning(carol, 1e18)), false);
        pass(WINDOW);
        E.Claim memory one = claimOf(jobId, 1, earnings, 0);
        one.jobId = other;
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowInvalidProof.selector, other, alice));
        claim(one);
        one.jobId = jobId;
        one.epoch = 2;
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowUnknownRoot.selector, jobId, 2));
        claim(one);
    }

    function test_aLaterRootCannotEraseAWorker() public {
        Earning[] memory first = list(earning(alice, 3e18), earning(bob, 2e18));
        Earning[] memory second = list(earning(bob, 8e18));
        _anchorAndPass(1, first, false);
        anchorEarnings(jobId, committee, 2, second, false);
        assertEq(claim(claimOf(jobId, 1, first, 0)), 3e18, "while the later one is in its window");
        pass(WINDOW);
        assertEq(claim(claimOf(jobId, 1, first, 1)), 2e18, "and after it");
    }

    function test_rootsThatContradictOneAnotherShareOneTotal() public {
        Earning[] memory first = list(earning(alice, 300e18));
        Earning[] memory second = list(earning(bob, 350e18));
        _anchorAndPass(1, first, false);
        _anchorAndPass(2, second, true);
        assertEq(claim(claimOf(jobId, 1, first, 0)), 300e18, "alice");
        assertEq(claim(claimOf(jobId, 2, second, 0)), 50e18, "bob, what is left of the total");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNothingToClaim.selector, jobId, bob));
        claim(claimOf(jobId, 2, second, 0));
        escrow.refund(jobId);
        assertExact(jobId, 0);
    }

    function test_leavesThatAddUpToMoreThanTheTotalPayTheTotal() public {
        Earning[] memory forged = list(earning(alice, POT), earning(bob, POT));
        anchor(_settlement(1, treeOf(jobId, forged)[0], 10e18), committee);
        pass(WINDOW);
        assertEq(claim(claimOf(jobId, 1, forged, 0)), 10e18, "no more than the epoch limit let through");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNothingToClaim.selector, jobId, bob));
        claim(claimOf(jobId, 1, forged, 1));
    }

    function test_anOlderRootDoesNotSpendWhatIsStillInItsWindow() public {
        Earning[] memory forged = list(earning(alice, POT));
        anchor(_settlement(1, treeOf(jobId, forged)[0], 10e18), committee);
        pass(WINDOW);
        anchor(_settlement(2, SPEC, 200e18), committee);
        assertEq(claim(claimOf(jobId, 1, forged, 0)), 10e18, "the surviving total only");
    }

    function test_claimManyPaysAccountsOfManyJobs() public {
        (bytes32 other, address[] memory otherCommittee) = openAndStart("other");
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18), earning(carol, 1e18));
        Earning[] memory others = list(earning(carol, 10e18), earning(alice, 20e18));
        anchorEarnings(other, otherCommittee, 4, others, false);
        _anchorAndPass(1, earnings, false);
        claim(claimOf(jobId, 1, earnings, 1)); // somebody was in front
        E.Claim[] memory claims = new E.Claim[](5);
        for (uint256 i; i < 3; ++i) {
            claims[i] = claimOf(jobId, 1, earnings, i);
        }
        (claims[3], claims[4]) = (claimOf(other, 4, others, 0), claimOf(other, 4, others, 1));
        vm.prank(stranger);
        assertEq(escrow.claimMany(claims), 34e18, "sum");
        assertEq(mcc.balanceOf(alice), 23e18, "alice");
        assertEq(mcc.balanceOf(bob), 2e18, "bob");
        assertEq(mcc.balanceOf(carol), 11e18, "carol, by one transfer");
        assertEq(escrow.job(jobId).paid, 6e18, "paid of one");
        assertEq(escrow.job(other).paid, 30e18, "paid of the other");
    }

    function test_claimManyWithOneForgedClaimPaysNothing() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        _anchorAndPass(1, earnings, false);
        E.Claim[] memory claims = new E.Claim[](2);
        (claims[0], claims[1]) = (claimOf(jobId, 1, earnings, 0), claimOf(jobId, 1, earnings, 1));
        claims[1].earned = 3e18;
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowInvalidProof.selector, jobId, bob));
        escrow.claimMany(claims);
        assertEq(escrow.claimMany(new E.Claim[](0)), 0, "nothing is nothing");
    }

    // ------------------------------------------------------------------ refund

    function test_afterAFinalSettlementsWindowTheRestIsRefundedAtOnce() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        uint256 before = mcc.balanceOf(researcher);
        anchorEarnings(jobId, committee, 1, earnings, true);
        uint256 claimableAt = vm.getBlockTimestamp() + WINDOW;
        vm.warp(claimableAt - 1);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWindowOpen.selector, claimableAt));
        escrow.refund(jobId);
        vm.warp(claimableAt);
        vm.prank(stranger);
        assertEq(escrow.refund(jobId), POT - 5e18, "amount");
        assertEq(mcc.balanceOf(researcher) - before, POT - 5e18, "to the researcher");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, jobId, E.Status.Refunded));
        escrow.refund(jobId);
        claim(claimOf(jobId, 1, earnings, 0));
        assertExact(jobId, 2e18);
        claim(claimOf(jobId, 1, earnings, 1));
        assertExact(jobId, 0);
        assertEq(mcc.balanceOf(address(escrow)), 0, "nothing left");
    }

    function test_withoutAFinalSettlementTheRestIsRefundedAfterTheSettleDeadline() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        _anchorAndPass(1, earnings, false);
        claim(claimOf(jobId, 1, earnings, 0));
        uint256 deadline = escrow.job(jobId).settleDeadline;
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNotRefundable.selector, deadline));
        escrow.refund(jobId);
        vm.warp(deadline + 1);
        assertEq(escrow.refund(jobId), POT - 5e18, "amount");
        claim(claimOf(jobId, 1, earnings, 1));
        assertExact(jobId, 0);
    }

    function test_aRootInItsWindowAtTheDeadlineIsKept() public {
        Earning[] memory earnings = list(earning(alice, 3e18));
        uint256 deadline = escrow.job(jobId).settleDeadline;
        vm.warp(deadline);
        anchorEarnings(jobId, committee, 1, earnings, false);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNotRefundable.selector, deadline + 2 * WINDOW));
        escrow.refund(jobId);
        vm.warp(deadline + 2 * WINDOW + 1);
        assertEq(escrow.refund(jobId), POT - 3e18, "the promised part stays");
        claim(claimOf(jobId, 1, earnings, 0));
        assertExact(jobId, 0);
    }

    function test_withoutAnySettlementEverythingIsRefunded() public {
        vm.warp(escrow.job(jobId).settleDeadline + 1);
        assertEq(escrow.refund(jobId), POT, "amount");
        assertExact(jobId, 0);
    }

    function test_aJobThatNobodyStartedIsRefundedAfterItsDeadline() public {
        bytes32 other = open("other");
        vm.warp(escrow.job(other).settleDeadline + 1);
        assertEq(escrow.refund(other), POT, "amount");
        vm.prank(researcher);
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowWrongStatus.selector, other, E.Status.Refunded));
        escrow.cancel(other);
    }

    function test_aFinalSettlementOfTheWholePotRefundsNothing() public {
        anchor(_settlement(1, SPEC, EPOCH_LIMIT), committee);
        pass(WINDOW);
        anchor(_settlement(2, SALT, 2 * EPOCH_LIMIT), committee);
        pass(WINDOW);
        Earning[] memory earnings = list(earning(alice, POT));
        _anchorAndPass(3, earnings, true);
        assertEq(escrow.refund(jobId), 0, "amount");
        claim(claimOf(jobId, 3, earnings, 0));
        assertExact(jobId, 0);
    }

    /// @dev Every order of three claims and the refund, and every choice of claims in front of it.
    function testFuzz_anyMixOfClaimsAndRefundIsExact(uint96 a, uint96 b, uint96 c, uint8 order, uint8 when) public {
        Earning[] memory earnings = list(
            earning(alice, 1 + a % 100e18), earning(bob, 1 + b % 100e18), earning(carol, 1 + c % 100e18)
        );
        _anchorAndPass(1, earnings, true);
        for (uint256 step; step < 3; ++step) {
            if (step == when % 4) escrow.refund(jobId);
            claim(claimOf(jobId, 1, earnings, (step + order) % 3));
        }
        if (when % 4 == 3) escrow.refund(jobId);
        assertExact(jobId, 0);
        for (uint256 i; i < 3; ++i) {
            assertEq(mcc.balanceOf(earnings[i].account), earnings[i].earned, "earned");
        }
        assertEq(mcc.balanceOf(address(escrow)), 0, "nothing left");
    }

    // ------------------------------------------------------------------ reentrancy

    function test_aTokenThatCallsBackIsRefused() public {
        ReentrantToken hostile = new ReentrantToken();
        hostile.approve(address(registry), type(uint256).max);
        escrow = Deploy.jobEscrow(MCC(address(hostile)), registry);
        hostile.transfer(researcher, CAP);
        vm.prank(researcher);
        hostile.approve(address(escrow), CAP);
        (jobId, committee) = openAndStart("hostile");
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        _anchorAndPass(1, earnings, true);
        E.Claim memory one = claimOf(jobId, 1, earnings, 0);
        E.Claim[] memory many = new E.Claim[](1);
        many[0] = claimOf(jobId, 1, earnings, 1);
        hostile.aim(address(escrow), abi.encodeCall(E.claimMany, (many)));
        claim(one);
        _assertCalledBackInVain(hostile);
        hostile.aim(address(escrow), abi.encodeCall(E.refund, (jobId)));
        claim(many[0]);
        _assertCalledBackInVain(hostile);
        hostile.aim(
            address(escrow),
            abi.encodeCall(E.claim, (jobId, 1, alice, one.earned, one.receiptsRoot, one.proof))
        );
        escrow.refund(jobId);
        _assertCalledBackInVain(hostile);
        assertEq(hostile.balanceOf(alice) + hostile.balanceOf(bob), 5e18, "paid once");
        assertExact(jobId, 0);
    }

    // ------------------------------------------------------------------ void

    function test_onlyTheCourtVoidsARoot() public {
        anchor(_settlement(1, SPEC, 1), committee);
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

    function test_aRootThatSurvivedItsWindowCannotBeVoided() public {
        _appointCourtInTime();
        bytes memory refusal = abi.encodeWithSelector(E.JobEscrowUnknownRoot.selector, jobId, 0);
        vm.expectRevert(refusal);
        _void();
        anchor(_settlement(1, SPEC, 1), committee);
        pass(WINDOW);
        refusal = abi.encodeWithSelector(E.JobEscrowUnknownRoot.selector, jobId, 1);
        vm.expectRevert(refusal);
        _void();
    }

    // ------------------------------------------------------------------ steps

    function _settlement(uint64 epoch, bytes32 root, uint256 total) private view returns (E.Settlement memory) {
        return settlementOf(jobId, epoch, root, total, false);
    }

    function _expectRefused(E.Settlement memory settlement, uint256 bitmap, bytes memory signatures, bytes4 selector)
        private
    {
        vm.expectPartialRevert(selector);
        escrow.anchor(settlement, committee, bitmap, signatures);
    }

    function _anchorAndPass(uint64 epoch, Earning[] memory earnings, bool isFinal) private {
        anchorEarnings(jobId, committee, epoch, earnings, isFinal);
        pass(WINDOW);
    }

    function _assertCalledBackInVain(ReentrantToken hostile) private view {
        assertTrue(hostile.calls() > 0, "called back");
        assertTrue(hostile.refusal() == bytes4(keccak256("ReentrancyGuardReentrantCall()")), "refused");
    }

    /// @dev A court in power, and a job that began after its appointment.
    function _appointCourtInTime() private {
        appointCourt();
        (jobId, committee) = openAndStart("in time");
    }

    function _void() private {
        court.call(address(escrow), abi.encodeCall(E.voidRoot, (jobId)));
    }

    function _min(bytes32 a, bytes32 b) private pure returns (bytes32) {
        return a < b ? a : b;
    }

    function _max(bytes32 a, bytes32 b) private pure returns (bytes32) {
        return a < b ? b : a;
    }
}
