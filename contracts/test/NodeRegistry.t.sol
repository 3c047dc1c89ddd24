// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {MCC} from "../src/MCC.sol";
import {NodeRegistry as R} from "../src/NodeRegistry.sol";
import {Deploy} from "./support/Deploy.sol";
import {FeeToken, ReentrantToken} from "./support/Hostile.sol";
import {Swarm} from "./support/Swarm.sol";
import {vm} from "./support/Vm.sol";

contract NodeRegistryTest is Swarm {
    uint256 private constant KEY = 42;
    address private node = vm.addr(KEY);

    function setUp() public {
        deploy();
    }

    // ------------------------------------------------------------------ registration

    function test_aNodeRegistersItselfOnce() public {
        vm.prank(node);
        registry.register(3, alice);
        R.Node memory stored = registry.nodeOf(node);
        assertEq(stored.payout, alice, "payout");
        assertEq(stored.roles, 3, "roles");
        vm.prank(node);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryAlreadyRegistered.selector, node));
        registry.register(1, bob);
    }

    function test_rolesAndPayoutMustMakeSense() public {
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryInvalidRoles.selector, 0));
        registry.register(0, alice);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryInvalidRoles.selector, 4));
        registry.register(4, alice);
        vm.expectRevert(R.NodeRegistryInvalidPayout.selector);
        registry.register(1, address(0));
    }

    function test_anybodySendsASignedRegistration() public {
        uint256 deadline = vm.getBlockTimestamp();
        bytes memory signature = _registration(registry, KEY, 2, alice, deadline);
        vm.prank(stranger);
        registry.registerBySig(node, 2, alice, deadline, signature);
        assertEq(registry.nodeOf(node).payout, alice, "payout");
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryAlreadyRegistered.selector, node));
        registry.registerBySig(node, 2, alice, deadline, signature);
    }

    function test_aSignedRegistrationCannotBeChangedOnItsWay() public {
        uint256 deadline = vm.getBlockTimestamp() + 1;
        bytes memory signature = _registration(registry, KEY, 2, alice, deadline);
        bytes memory refusal = abi.encodeWithSelector(R.NodeRegistryInvalidSignature.selector, node);
        vm.expectRevert(refusal);
        registry.registerBySig(node, 2, stranger, deadline, signature);
        vm.expectRevert(refusal);
        registry.registerBySig(node, 3, alice, deadline, signature);
        vm.expectRevert(refusal);
        registry.registerBySig(node, 2, alice, deadline + 1, signature);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryInvalidSignature.selector, bob));
        registry.registerBySig(bob, 2, alice, deadline, signature);
    }

    function test_aSignedRegistrationExpires() public {
        uint256 deadline = vm.getBlockTimestamp();
        bytes memory signature = _registration(registry, KEY, 2, alice, deadline);
        pass(1);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistrySignatureExpired.selector, deadline));
        registry.registerBySig(node, 2, alice, deadline, signature);
    }

    function test_aSignedRegistrationIsForOneRegistryOnOneChain() public {
        uint256 deadline = vm.getBlockTimestamp();
        R other = Deploy.nodeRegistry(mcc, EPOCH_BLOCKS, UNBONDING, MINIMUM_STAKE);
        bytes memory signature = _registration(other, KEY, 2, alice, deadline);
        bytes memory refusal = abi.encodeWithSelector(R.NodeRegistryInvalidSignature.selector, node);
        vm.expectRevert(refusal);
        registry.registerBySig(node, 2, alice, deadline, signature);
        signature = _registration(registry, KEY, 2, alice, deadline);
        vm.chainId(block.chainid + 1);
        vm.expectRevert(refusal);
        registry.registerBySig(node, 2, alice, deadline, signature);
    }

    function test_aMalleableOrMalformedRegistrationIsRefused() public {
        uint256 deadline = vm.getBlockTimestamp();
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(KEY, _registrationDigest(registry, node, 2, alice, deadline));
        bytes memory refusal = abi.encodeWithSelector(R.NodeRegistryInvalidSignature.selector, node);
        bytes memory high = abi.encodePacked(r, bytes32(ORDER - uint256(s)), v == 27 ? uint8(28) : uint8(27));
        vm.expectRevert(refusal);
        registry.registerBySig(node, 2, alice, deadline, high);
        vm.expectRevert(refusal);
        registry.registerBySig(node, 2, alice, deadline, abi.encodePacked(r, s));
    }

    function test_onlyThePresentPayoutAddressChangesThePayout() public {
        _register(KEY, 2, alice);
        vm.prank(node);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryUnauthorized.selector, node));
        registry.setPayout(node, bob);
        vm.prank(alice);
        vm.expectRevert(R.NodeRegistryInvalidPayout.selector);
        registry.setPayout(node, address(0));
        vm.prank(alice);
        registry.setPayout(node, bob);
        vm.prank(alice);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryUnauthorized.selector, alice));
        registry.setPayout(node, alice);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryNotRegistered.selector, carol));
        registry.setPayout(carol, alice);
    }

    // ------------------------------------------------------------------ stake

    function test_stakeCountsFromTheNextEpochOn() public {
        _register(KEY, 3, alice);
        vm.roll(1000); // the first block of an epoch
        registry.stake(node, MINIMUM_STAKE);
        vm.roll(1000 + EPOCH_BLOCKS - 1);
        assertEq(registry.activeStake(node), 0, "last block of the epoch");
        assertEq(registry.validators().length, 0, "validators");
        vm.roll(1000 + EPOCH_BLOCKS);
        assertEq(registry.activeStake(node), MINIMUM_STAKE, "first block of the next");
        assertEq(registry.validators()[0], node, "validator");
        assertEq(registry.orchestrators()[0], node, "orchestrator");
    }

    function test_twoStakesInOneEpochCountTogether() public {
        addValidator(KEY, MINIMUM_STAKE);
        passEpoch();
        registry.stake(node, 1e18);
        registry.stake(node, 2e18);
        assertEq(registry.activeStake(node), MINIMUM_STAKE, "before");
        passEpoch();
        assertEq(registry.activeStake(node), MINIMUM_STAKE + 3e18, "after");
        assertEq(_weightOf(node, registry.currentEpoch()), 103, "weight");
    }

    function test_belowTheMinimumNoRoleIsActive() public {
        addValidator(KEY, MINIMUM_STAKE - 1);
        passEpoch();
        assertEq(registry.validators().length, 0, "below");
        registry.stake(node, 1);
        passEpoch();
        assertEq(registry.validators().length, 1, "at the minimum");
    }

    function test_aRoleThatIsNotAskedForIsNotGiven() public {
        addValidator(KEY, MINIMUM_STAKE);
        passEpoch();
        assertEq(registry.orchestrators().length, 0, "orchestrators");
    }

    function test_rolesChangeWithTheNextEpoch() public {
        addValidator(KEY, MINIMUM_STAKE);
        passEpoch();
        vm.prank(node);
        registry.setRoles(1);
        assertEq(registry.validators().length, 1, "still a validator");
        passEpoch();
        assertEq(registry.validators().length, 0, "no validator any more");
        assertEq(registry.orchestrators().length, 1, "orchestrator");
        vm.prank(node);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryInvalidRoles.selector, 8));
        registry.setRoles(8);
        vm.prank(carol);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryNotRegistered.selector, carol));
        registry.setRoles(1);
    }

    function test_stakeIsForRegisteredNodesAndNotNothing() public {
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryNotRegistered.selector, node));
        registry.stake(node, MINIMUM_STAKE);
        _register(KEY, 2, alice);
        vm.expectRevert(R.NodeRegistryInvalidAmount.selector);
        registry.stake(node, 0);
    }

    function test_aTokenThatKeepsAFeeCannotBeStaked() public {
        FeeToken fee = new FeeToken();
        R other = Deploy.nodeRegistry(MCC(address(fee)), EPOCH_BLOCKS, UNBONDING, MINIMUM_STAKE);
        fee.approve(address(other), type(uint256).max);
        other.register(2, alice);
        vm.expectRevert(
            abi.encodeWithSelector(
                R.NodeRegistryDepositMismatch.selector, MINIMUM_STAKE, MINIMUM_STAKE - MINIMUM_STAKE / 100
            )
        );
        other.stake(address(this), MINIMUM_STAKE);
    }

    function test_aTokenThatCallsBackCannotWithdrawTwice() public {
        ReentrantToken hostile = new ReentrantToken();
        R other = Deploy.nodeRegistry(MCC(address(hostile)), EPOCH_BLOCKS, UNBONDING, MINIMUM_STAKE);
        hostile.approve(address(other), type(uint256).max);
        other.register(2, alice);
        other.stake(address(this), MINIMUM_STAKE);
        other.startUnbond(address(this), MINIMUM_STAKE / 2);
        pass(UNBONDING);
        hostile.aim(address(other), abi.encodeCall(R.withdraw, (address(this))));
        other.withdraw(address(this));
        assertEq(hostile.calls(), 1, "called back");
        assertTrue(hostile.refusal() == bytes4(keccak256("ReentrancyGuardReentrantCall()")), "refused");
        assertEq(hostile.balanceOf(alice), MINIMUM_STAKE / 2, "paid once");
    }

    // ------------------------------------------------------------------ unbonding

    function test_unbondedStakeGoesToThePayoutAddressAfterItsTime() public {
        addValidator(KEY, MINIMUM_STAKE);
        vm.prank(node);
        registry.startUnbond(node, MINIMUM_STAKE);
        uint256 ready = vm.getBlockTimestamp() + UNBONDING;
        vm.warp(ready - 1);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryStillUnbonding.selector, ready));
        registry.withdraw(node);
        vm.warp(ready);
        vm.prank(stranger);
        assertEq(registry.withdraw(node), MINIMUM_STAKE, "amount");
        assertEq(mcc.balanceOf(payoutOf(node)), MINIMUM_STAKE, "payout");
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryNothingToWithdraw.selector, node));
        registry.withdraw(node);
    }

    function test_onlyTheNodeAndItsPayoutAddressUnbond() public {
        addValidator(KEY, MINIMUM_STAKE);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryUnauthorized.selector, address(this)));
        registry.startUnbond(node, 1);
        vm.startPrank(payoutOf(node));
        registry.startUnbond(node, 1);
        vm.expectRevert(R.NodeRegistryInvalidAmount.selector);
        registry.startUnbond(node, 0);
        vm.expectRevert(
            abi.encodeWithSelector(R.NodeRegistryInsufficientStake.selector, MINIMUM_STAKE - 1, MINIMUM_STAKE)
        );
        registry.startUnbond(node, MINIMUM_STAKE);
    }

    function test_unbondingStakeCountsToTheEndOfTheEpochOnly() public {
        addValidator(KEY, MINIMUM_STAKE);
        passEpoch();
        vm.prank(node);
        registry.startUnbond(node, 1);
        assertEq(registry.validators().length, 1, "this epoch");
        assertEq(registry.activeStake(node), MINIMUM_STAKE - 1, "what is left counts at once");
        passEpoch();
        assertEq(registry.validators().length, 0, "the next");
    }

    function test_aSecondUnbondingStartsTheTimeAnew() public {
        addValidator(KEY, MINIMUM_STAKE);
        vm.startPrank(node);
        registry.startUnbond(node, 1);
        pass(UNBONDING);
        registry.startUnbond(node, 2);
        uint256 ready = vm.getBlockTimestamp() + UNBONDING;
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryStillUnbonding.selector, ready));
        registry.withdraw(node);
        pass(UNBONDING);
        assertEq(registry.withdraw(node), 3, "both");
    }

    // ------------------------------------------------------------------ court

    function test_theCourtIsAppointedOnceByTheDeployer() public {
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryUnauthorized.selector, stranger));
        registry.appointCourt(address(court));
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryInvalidCourt.selector, stranger));
        registry.appointCourt(stranger);
        registry.appointCourt(address(court));
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryCourtAlreadyAppointed.selector, address(court)));
        registry.appointCourt(address(escrow));
    }

    function test_theCourtsPowerBeginsAfterOneUnbondingTime() public {
        addValidator(KEY, MINIMUM_STAKE);
        registry.appointCourt(address(court));
        pass(UNBONDING - 1);
        assertEq(registry.court(), address(0), "no court yet");
        _expectUnauthorizedCourt();
        court.call(address(registry), abi.encodeCall(R.lock, (node)));
        pass(1);
        assertEq(registry.court(), address(court), "in power");
        court.call(address(registry), abi.encodeCall(R.lock, (node)));
    }

    function test_withoutACourtNobodyLocksOrSlashes() public {
        addValidator(KEY, MINIMUM_STAKE);
        bytes memory refusal = abi.encodeWithSelector(R.NodeRegistryUnauthorized.selector, address(this));
        vm.expectRevert(refusal);
        registry.lock(node);
        vm.expectRevert(refusal);
        registry.unlock(node);
        vm.expectRevert(refusal);
        registry.slash(node, 1, address(this));
    }

    function test_lockedStakeCannotBeWithdrawn() public {
        addValidator(KEY, MINIMUM_STAKE);
        appointCourt();
        _lock();
        _lock();
        vm.prank(node);
        registry.startUnbond(node, MINIMUM_STAKE);
        pass(UNBONDING);
        bytes memory refusal = abi.encodeWithSelector(R.NodeRegistryNodeLocked.selector, node);
        vm.expectRevert(refusal);
        registry.withdraw(node);
        court.call(address(registry), abi.encodeCall(R.unlock, (node)));
        vm.expectRevert(refusal);
        registry.withdraw(node);
        court.call(address(registry), abi.encodeCall(R.unlock, (node)));
        assertEq(registry.withdraw(node), MINIMUM_STAKE, "after the last unlock");
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryNodeNotLocked.selector, node));
        court.call(address(registry), abi.encodeCall(R.unlock, (node)));
    }

    function test_unbondingStakeIsSlashed() public {
        addValidator(KEY, MINIMUM_STAKE);
        appointCourt();
        vm.prank(node);
        registry.startUnbond(node, MINIMUM_STAKE);
        pass(UNBONDING);
        _slash(MINIMUM_STAKE, carol);
        assertEq(mcc.balanceOf(carol), MINIMUM_STAKE, "beneficiary");
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryNothingToWithdraw.selector, node));
        registry.withdraw(node);
    }

    function test_aSlashTakesBondedStakeFirstAndNeverMoreThanThereIs() public {
        addValidator(KEY, MINIMUM_STAKE);
        appointCourt();
        vm.prank(node);
        registry.startUnbond(node, 40e18);
        _slash(70e18, carol);
        R.Node memory stored = registry.nodeOf(node);
        assertEq(stored.bonded, 0, "bonded");
        assertEq(stored.unbonding, 30e18, "unbonding");
        _slash(type(uint256).max, carol);
        assertEq(mcc.balanceOf(carol), MINIMUM_STAKE, "all");
        assertEq(mcc.balanceOf(address(registry)), 0, "nothing left");
    }

    function test_aSlashWithoutBeneficiaryBurns() public {
        addValidator(KEY, MINIMUM_STAKE);
        appointCourt();
        uint256 supply = mcc.totalSupply();
        _slash(1e18, address(0));
        assertEq(mcc.totalSupply(), supply - 1e18, "supply");
        passEpoch();
        assertEq(registry.validators().length, 0, "below the minimum");
    }

    // ------------------------------------------------------------------ seats and draw

    function test_theSetOfAPastEpochNeverChanges() public {
        addValidators(5);
        uint256 epoch = registry.currentEpoch();
        bytes32 before = _setHash(epoch);
        vm.prank(vm.addr(2));
        registry.startUnbond(vm.addr(2), MINIMUM_STAKE);
        registry.stake(vm.addr(3), 50e18);
        addValidator(KEY, 7 * MINIMUM_STAKE);
        assertEq(_setHash(epoch), before, "in the same epoch");
        for (uint256 i; i < 12; ++i) {
            passEpoch();
            registry.stake(vm.addr(2), MINIMUM_STAKE);
            vm.prank(vm.addr(2));
            registry.startUnbond(vm.addr(2), MINIMUM_STAKE);
            registry.stake(vm.addr(4), 1e18);
            assertEq(_setHash(epoch), before, "later");
        }
        assertTrue(_setHash(registry.currentEpoch()) != before, "the present one does");
    }

    function test_aFreedSeatIsUsedAgain() public {
        addValidators(3);
        uint256 epoch = registry.currentEpoch();
        vm.prank(vm.addr(2));
        registry.startUnbond(vm.addr(2), MINIMUM_STAKE);
        addValidator(KEY, MINIMUM_STAKE);
        assertEq(registry.validators()[1], vm.addr(2), "this epoch");
        passEpoch();
        address[] memory now_ = registry.validators();
        assertEq(now_.length, 3, "count");
        assertEq(now_[1], node, "the same seat");
        (address[] memory then_,) = registry.activeAt(2, epoch);
        assertEq(then_[1], vm.addr(2), "the past");
    }

    function test_aFullRegistryGivesTheLightestSeatToAHeavierNewcomer() public {
        uint256 seats = registry.MAX_SEATS();
        for (uint256 i = 1; i <= seats; ++i) {
            addValidator(i, i == 100 ? MINIMUM_STAKE : MINIMUM_STAKE + 1e18);
        }
        passEpoch();
        address weakest = vm.addr(100);
        address same = addValidator(1000, MINIMUM_STAKE);
        passEpoch();
        assertEq(_weightOf(weakest, registry.currentEpoch()), 100, "an equal one displaces nobody");
        address heavier = addValidator(2000, MINIMUM_STAKE + 2e18);
        passEpoch();
        assertEq(registry.validators().length, seats, "bounded");
        assertEq(_weightOf(same, registry.currentEpoch()), 0, "no lighter one is displaced by an equal");
        assertEq(_weightOf(weakest, registry.currentEpoch()), 0, "the lightest lost its seat");
        assertEq(_weightOf(heavier, registry.currentEpoch()), 102, "to the heavier");
        assertEq(registry.activeStake(weakest), MINIMUM_STAKE, "but keeps its stake");
        vm.prank(vm.addr(5));
        registry.startUnbond(vm.addr(5), 2e18);
        registry.refreshSeats(weakest);
        passEpoch();
        assertEq(_weightOf(weakest, registry.currentEpoch()), 100, "and gets the next free one when it asks");
        assertEq(_weightOf(heavier, registry.currentEpoch()), 102, "not the one it lost");
        uint256 gas = gasleft();
        registry.drawCommittee("seed", registry.currentEpoch(), 21);
        assertLe(gas - gasleft(), 3_000_000, "gas of a draw from a full registry");
    }

    function test_aDrawHasDifferentMembersAndIsTheSameEveryTime() public {
        addValidators(30);
        uint256 epoch = registry.currentEpoch();
        address[] memory drawn = registry.drawCommittee("seed", epoch, 21);
        assertEq(drawn.length, 21, "size");
        for (uint256 i; i < drawn.length; ++i) {
            assertTrue(keyOf[drawn[i]] != 0, "a validator");
            for (uint256 j; j < i; ++j) {
                assertTrue(drawn[i] != drawn[j], "different");
            }
        }
        passBlocks(50);
        assertEq(_hash(registry.drawCommittee("seed", epoch, 21)), _hash(drawn), "the same later");
        assertTrue(_hash(registry.drawCommittee("other", epoch, 21)) != _hash(drawn), "another seed");
    }

    function test_aDrawTakesAllWhenThereAreFewAndNoneWhenThereAreNone() public {
        assertEq(registry.drawCommittee("seed", registry.currentEpoch(), 21).length, 0, "none");
        addValidators(3);
        assertEq(registry.drawCommittee("seed", registry.currentEpoch(), 21).length, 3, "all");
    }

    function test_aDrawFollowsTheStake() public {
        addValidator(1, MINIMUM_STAKE);
        address heavy = addValidator(2, 9 * MINIMUM_STAKE);
        passEpoch();
        uint256 first;
        for (uint256 i; i < 400; ++i) {
            if (registry.drawCommittee(bytes32(i), registry.currentEpoch(), 1)[0] == heavy) ++first;
        }
        assertTrue(first > 330 && first < 390, "nine of ten");
    }

    function test_constructorParametersMustMakeSense() public {
        _expectInvalid(0, UNBONDING, MINIMUM_STAKE);
        _expectInvalid(EPOCH_BLOCKS, 0, MINIMUM_STAKE);
        _expectInvalid(EPOCH_BLOCKS, uint256(type(uint32).max) + 1, MINIMUM_STAKE);
        _expectInvalid(EPOCH_BLOCKS, UNBONDING, 1e18 - 1);
        this.deployRegistry(EPOCH_BLOCKS, UNBONDING, 1e18);
    }

    function deployRegistry(uint256 epochBlocks, uint256 unbonding, uint256 minimumStake) external {
        Deploy.nodeRegistry(mcc, epochBlocks, unbonding, minimumStake);
    }

    // ------------------------------------------------------------------ steps

    function _expectInvalid(uint256 epochBlocks, uint256 unbonding, uint256 minimumStake) private {
        try this.deployRegistry(epochBlocks, unbonding, minimumStake) {
            assertTrue(false, "deployed");
        } catch (bytes memory reason) {
            assertTrue(bytes4(reason) == R.NodeRegistryInvalidParameter.selector, "reason");
        }
    }

    function _register(uint256 key, uint8 roles, address payout) private {
        vm.prank(vm.addr(key));
        registry.register(roles, payout);
    }

    function _registration(R target, uint256 key, uint8 roles, address payout, uint256 deadline)
        private
        view
        returns (bytes memory)
    {
        return signatureOf(key, _registrationDigest(target, vm.addr(key), roles, payout, deadline));
    }

    function _registrationDigest(R target, address who, uint8 roles, address payout, uint256 deadline)
        private
        view
        returns (bytes32)
    {
        bytes32 domain = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256("meshd"),
                keccak256("1"),
                block.chainid,
                target
            )
        );
        bytes32 inner = keccak256(
            abi.encode(
                keccak256("NodeRegistration(address node,uint8 roles,address payout,uint256 deadline)"),
                who,
                roles,
                payout,
                deadline
            )
        );
        return keccak256(abi.encodePacked("\x19\x01", domain, inner));
    }

    function _lock() private {
        court.call(address(registry), abi.encodeCall(R.lock, (node)));
    }

    function _slash(uint256 amount, address beneficiary) private {
        court.call(address(registry), abi.encodeCall(R.slash, (node, amount, beneficiary)));
    }

    function _expectUnauthorizedCourt() private {
        vm.expectRevert(abi.encodeWithSelector(R.NodeRegistryUnauthorized.selector, address(court)));
    }

    function _weightOf(address who, uint256 epoch) private view returns (uint256 weight) {
        (address[] memory nodes, uint256[] memory weights) = registry.activeAt(2, epoch);
        for (uint256 i; i < nodes.length; ++i) {
            if (nodes[i] == who) weight = weights[i];
        }
    }

    function _setHash(uint256 epoch) private view returns (bytes32) {
        (address[] memory nodes, uint256[] memory weights) = registry.activeAt(2, epoch);
        return keccak256(abi.encode(nodes, weights));
    }

    function _hash(address[] memory nodes) private pure returns (bytes32) {
        return keccak256(abi.encode(nodes));
    }
}
