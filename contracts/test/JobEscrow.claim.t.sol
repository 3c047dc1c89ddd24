// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow as E} from "../src/IJobEscrow.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {MCC} from "../src/MCC.sol";
import {Deploy} from "./support/Deploy.sol";
import {ReentrantToken} from "./support/Hostile.sol";
import {StartedJob} from "./support/StartedJob.sol";
import {vm} from "./support/Vm.sol";

/// @notice What leaves a pot: claims and refunds.
contract JobEscrowClaimTest is StartedJob {
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
        anchorAndPass(1, earnings, false);
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
        anchorAndPass(1, first, false);
        claim(claimOf(jobId, 1, first, 0));
        anchorAndPass(2, second, false);
        assertEq(claim(claimOf(jobId, 2, second, 0)), 1e18, "difference");
        assertEq(claim(claimOf(jobId, 2, second, 1)), 2e18, "all at once");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNothingToClaim.selector, jobId, bob));
        claim(claimOf(jobId, 1, first, 1));
        assertEq(escrow.claimed(jobId, alice), 4e18, "claimed");
    }

    function test_aForgedClaimIsRefused() public {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18), earning(carol, 1e18));
        anchorAndPass(1, earnings, false);
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

    function test_aNodeOfTheTreeIsNoLeaf() public view {
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        bytes32[] memory tree = treeOf(jobId, earnings);
        assertEq(tree[0], keccak256(abi.encode(_min(tree[1], tree[2]), _max(tree[1], tree[2]))), "root");
        assertTrue(tree[0] != escrow.leafOf(tree[1], address(uint160(uint256(tree[2]))), 0, 0), "double hash");
        assertEq(escrow.leafOf(jobId, alice, 3e18, receiptsRootOf(alice)), leafOf(jobId, earnings[0]), "leaf");
    }

    function test_aProofOfAnotherJobOrEpochIsRefused() public {
        (bytes32 other, address[] memory otherCommittee) = openAndStart("other");
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18));
        anchorAndPass(1, earnings, false);
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
        anchorAndPass(1, first, false);
        anchorEarnings(jobId, committee, 2, second, false);
        assertEq(claim(claimOf(jobId, 1, first, 0)), 3e18, "while the later one is in its window");
        pass(WINDOW);
        assertEq(claim(claimOf(jobId, 1, first, 1)), 2e18, "and after it");
    }

    function test_rootsThatContradictOneAnotherShareOneTotal() public {
        Earning[] memory first = list(earning(alice, 300e18));
        Earning[] memory second = list(earning(bob, 350e18));
        anchorAndPass(1, first, false);
        anchorAndPass(2, second, true);
        assertEq(claim(claimOf(jobId, 1, first, 0)), 300e18, "alice");
        assertEq(claim(claimOf(jobId, 2, second, 0)), 50e18, "bob, what is left of the total");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNothingToClaim.selector, jobId, bob));
        claim(claimOf(jobId, 2, second, 0));
        escrow.refund(jobId);
        assertExact(jobId, 0);
    }

    function test_leavesThatAddUpToMoreThanTheTotalPayTheTotal() public {
        Earning[] memory forged = list(earning(alice, POT), earning(bob, POT));
        anchor(settlementAt(1, treeOf(jobId, forged)[0], 10e18), committee);
        pass(WINDOW);
        assertEq(claim(claimOf(jobId, 1, forged, 0)), 10e18, "no more than the epoch limit let through");
        vm.expectRevert(abi.encodeWithSelector(E.JobEscrowNothingToClaim.selector, jobId, bob));
        claim(claimOf(jobId, 1, forged, 1));
    }

    function test_anOlderRootDoesNotSpendWhatIsStillInItsWindow() public {
        Earning[] memory forged = list(earning(alice, POT));
        anchor(settlementAt(1, treeOf(jobId, forged)[0], 10e18), committee);
        pass(WINDOW);
        anchor(settlementAt(2, SPEC, 200e18), committee);
        assertEq(claim(claimOf(jobId, 1, forged, 0)), 10e18, "the surviving total only");
    }

    function test_claimManyPaysAccountsOfManyJobs() public {
        (bytes32 other, address[] memory otherCommittee) = openAndStart("other");
        Earning[] memory earnings = list(earning(alice, 3e18), earning(bob, 2e18), earning(carol, 1e18));
        Earning[] memory others = list(earning(carol, 10e18), earning(alice, 20e18));
        anchorEarnings(other, otherCommittee, 4, others, false);
        anchorAndPass(1, earnings, false);
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
        anchorAndPass(1, earnings, false);
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
        anchorAndPass(1, earnings, false);
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
        anchor(settlementAt(1, SPEC, EPOCH_LIMIT), committee);
        pass(WINDOW);
        anchor(settlementAt(2, SALT, 2 * EPOCH_LIMIT), committee);
        pass(WINDOW);
        Earning[] memory earnings = list(earning(alice, POT));
        anchorAndPass(3, earnings, true);
        assertEq(escrow.refund(jobId), 0, "amount");
        claim(claimOf(jobId, 3, earnings, 0));
        assertExact(jobId, 0);
    }

    /// @dev Every order of three claims and the refund, and every choice of claims in front of it.
    function testFuzz_anyMixOfClaimsAndRefundIsExact(uint96 a, uint96 b, uint96 c, uint8 order, uint8 when) public {
        Earning[] memory earnings = list(
            earning(alice, 1 + a % 100e18), earning(bob, 1 + b % 100e18), earning(carol, 1 + c % 100e18)
        );
        anchorAndPass(1, earnings, true);
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
        anchorAndPass(1, earnings, true);
        E.Claim memory one = claimOf(jobId, 1, earnings, 0);
        E.Claim[] memory many = new E.Claim[](1);
        many[0] = claimOf(jobId, 1, earnings, 1);
        hostile.aim(address(escrow), abi.encodeCall(JobEscrow.claimMany, (many)));
        claim(one);
        _assertCalledBackInVain(hostile);
        hostile.aim(address(escrow), abi.encodeCall(JobEscrow.refund, (jobId)));
        claim(many[0]);
        _assertCalledBackInVain(hostile);
        hostile.aim(
            address(escrow),
            abi.encodeCall(JobEscrow.claim, (jobId, 1, alice, one.earned, one.receiptsRoot, one.proof))
        );
        escrow.refund(jobId);
        _assertCalledBackInVain(hostile);
        assertEq(hostile.balanceOf(alice) + hostile.balanceOf(bob), 5e18, "paid once");
        assertExact(jobId, 0);
    }

    // ------------------------------------------------------------------ steps

    function _assertCalledBackInVain(ReentrantToken hostile) private view {
        assertTrue(hostile.calls() > 0, "called back");
        assertTrue(hostile.refusal() == bytes4(keccak256("ReentrancyGuardReentrantCall()")), "refused");
    }

    function _min(bytes32 a, bytes32 b) private pure returns (bytes32) {
        return a < b ? a : b;
    }

    function _max(bytes32 a, bytes32 b) private pure returns (bytes32) {
        return a < b ? b : a;
    }
}
