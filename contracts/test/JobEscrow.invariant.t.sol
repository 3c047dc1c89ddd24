// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow as E} from "../src/IJobEscrow.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {NodeRegistry as R} from "../src/NodeRegistry.sol";
import {Swarm} from "./support/Swarm.sol";
import {vm} from "./support/Vm.sol";

/// @notice Random walks over every entry point of escrow and registry, with many jobs side by side.
/// Each step picks an action and an object for which it is allowed, so that most steps do something;
/// whatever reverts unexpectedly fails the walk. After every step all pots must be exact.
contract JobEscrowInvariantTest is Swarm {
    uint256 private constant ACTIONS = 24;

    event Done(uint256 action, uint256 times);

    struct Anchor {
        uint64 epoch;
        Earning[] earnings;
    }

    struct Walked {
        bytes32 id;
        address[] committee;
        uint256[4] earned;
        /// Whether all its roots were signed by a quorum that computed them.
        bool honest;
    }

    Walked[] private jobs;
    mapping(bytes32 jobId => Anchor[]) private anchors;
    uint256[] private keys;
    address[4] private accounts = [vm.addr(1002), vm.addr(1003), vm.addr(1004), address(0xbeef)];
    uint256 private random;
    uint256 private donated;
    uint256[ACTIONS] private done;
    uint256 private steps;

    function setUp() public {
        deploy();
        appointCourt();
        for (uint256 key = 1; key <= 3; ++key) {
            addValidator(key, 3 * MINIMUM_STAKE);
            keys.push(key);
        }
        passEpoch();
    }

    /// forge-config: default.fuzz.runs = 24
    function testFuzz_allPotsStayExactWhateverHappens(uint256 seed) public {
        _walk(seed, 120);
        _finish();
    }

    function test_theWalkUsesEveryEntryPointAndMostStepsDoSomething() public {
        _walk(1, 400);
        uint256 effective;
        for (uint256 action; action < ACTIONS; ++action) {
            emit Done(action, done[action]);
            assertTrue(done[action] > 0, string.concat("action ", vm.toString(action)));
            effective += done[action];
        }
        assertTrue(effective * 10 > steps * 6, "more than six of ten");
        _finish();
    }

    function _walk(uint256 seed, uint256 count) private {
        random = seed;
        for (uint256 i; i < count; ++i) {
            this.step(); // a call of its own, so that its memory is given back
        }
    }

    function step() external {
        assertEq(msg.sender, address(this), "caller");
        ++steps;
        uint256 action = _below(ACTIONS);
        if (_act(action)) ++done[action];
        _assertEscrow();
        _assertRegistry();
    }

    // ------------------------------------------------------------------ what must always hold

    function _assertEscrow() private view {
        uint256 inPots;
        for (uint256 i; i < jobs.length; ++i) {
            E.JobView memory job = escrow.job(jobs[i].id);
            uint256 claimed;
            for (uint256 k; k < 4; ++k) {
                claimed += escrow.claimed(jobs[i].id, accounts[k]);
            }
            assertEq(claimed, job.paid, "paid is what accounts claimed");
            assertLe(job.paid, job.settledTotal, "paid is settled");
            assertLe(job.settledTotal, job.cap - job.burnt, "settled is deposited");
            assertEq(job.burnt, (job.cap + 99) / 100, "burnt");
            inPots += job.cap - job.burnt - job.paid - job.refunded;
        }
        assertEq(mcc.balanceOf(address(escrow)), inPots + donated, "the escrow holds all pots, and only them");
    }

    function _assertRegistry() private view {
        uint256 held;
        uint256 seated;
        for (uint256 i; i < keys.length; ++i) {
            R.Node memory node = registry.nodeOf(vm.addr(keys[i]));
            held += node.bonded + node.unbonding;
            if (node.bonded >= MINIMUM_STAKE && node.roles & 2 != 0) ++seated;
        }
        assertEq(mcc.balanceOf(address(registry)), held, "the registry holds all stakes, and only them");
        (address[] memory next,) = registry.activeAt(2, registry.currentEpoch() + 1);
        assertEq(next.length, seated, "from the next epoch on, seats follow stake and roles");
    }

    /// @dev Ends every job; what honest quorums signed is paid and refunded to the last unit.
    function _finish() private {
        pass(2000);
        for (uint256 i; i < jobs.length; ++i) {
            Walked storage job = jobs[i];
            E.Status status = escrow.job(job.id).status;
            if (status == E.Status.Open || status == E.Status.Started) escrow.refund(job.id);
            for (uint256 a; a < anchors[job.id].length; ++a) {
                for (uint256 k; k < 4; ++k) {
                    if (_isDue(job.id, a, k)) claim(_claim(job.id, a, k));
                }
            }
            E.JobView memory ended = escrow.job(job.id);
            assertExact(job.id, ended.settledTotal - ended.paid);
            if (job.honest) assertEq(ended.paid, ended.settledTotal, "everything promised is paid");
        }
        _assertEscrow();
    }

    // ------------------------------------------------------------------ actions

    function _act(uint256 action) private returns (bool) {
        if (action == 0) return _open(false);
        if (action == 1) return _open(true);
        if (action == 2) return _start();
        if (action == 3) return _cancel();
        if (action == 4 || action == 5) return _anchor(true);
        if (action == 6) return _anchor(false);
        if (action == 7) return _repeatAnchor();
        if (action == 8 || action == 9) return _claimOne();
        if (action == 10 || action == 11) return _claimMany();
        if (action == 12) return _refund();
        if (action == 13) return _void();
        if (action == 14) return _stake();
        if (action == 15) return _unbond();
        if (action == 16) return _withdraw();
        if (action == 17) return _slash();
        if (action == 18) return _lockOrUnlock();
        if (action == 19) return _changeNode();
        if (action == 20) return _addNode();
        if (action == 21) return _donate();
        if (action == 22) return _pass(1 + _below(8), 1);
        return _pass(_below(40), 1 + _below(10));
    }

    function _open(bool withPermit) private returns (bool) {
        if (jobs.length >= 24) return false;
        uint40 work = workDeadline();
        uint96 cap = uint96(100 + _below(CAP));
        bytes32 salt = bytes32(jobs.length);
        uint96 limit = uint96(1 + _below(cap));
        bytes32 jobId;
        if (withPermit) {
            vm.prank(researcher); // a permit that is not valid, and an allowance that is
            jobId = escrow.openWithPermit(
                SPEC, salt, cap, limit, WINDOW, work, work + 4 * WINDOW, work, 27, SPEC, SALT
            );
        } else {
            vm.prank(researcher);
            jobId = escrow.open(SPEC, salt, cap, limit, WINDOW, work, work + 4 * WINDOW);
        }
        jobs.push();
        (jobs[jobs.length - 1].id, jobs[jobs.length - 1].honest) = (jobId, true);
        return true;
    }

    function _start() private returns (bool) {
        for (uint256 i; i < jobs.length; ++i) {
            E.JobView memory job = escrow.job(jobs[i].id);
            if (job.status != E.Status.Open || vm.getBlockTimestamp() >= job.workDeadline) continue;
            if (vm.getBlockNumber() > job.openBlock + 200) continue;
            if (vm.getBlockNumber() < job.openBlock + 3) vm.roll(job.openBlock + 3);
            (address[] memory active,) = registry.activeAt(2, registry.epochOf(job.openBlock + 2));
            if (active.length == 0) continue;
            jobs[i].committee = start(jobs[i].id);
            return true;
        }
        return false;
    }

    function _cancel() private returns (bool) {
        (bool found, Walked storage walked) = _pick(E.Status.Open);
        if (!found || _below(8) != 0) return false;
        vm.prank(researcher);
        escrow.cancel(walked.id);
        return true;
    }

    /// @dev An honest root adds to what accounts earned; a forged one promises anything to anybody.
    function _anchor(bool honest) private returns (bool) {
        if (!honest && _below(3) != 0) return false;
        uint256 first = _below(jobs.length + 1);
        for (uint256 i; i < jobs.length; ++i) {
            Walked storage walked = jobs[(first + i) % jobs.length];
            E.JobView memory job = escrow.job(walked.id);
            if (job.status != E.Status.Started || job.isFinal) continue;
            if (vm.getBlockTimestamp() <= job.anchorDeadline) return _anchorOne(walked, job, honest);
        }
        return false;
    }

    function _anchorOne(Walked storage walked, E.JobView memory job, bool honest) private returns (bool) {
        if (vm.getBlockTimestamp() < job.claimableAt) {
            vm.warp(job.claimableAt);
            job = escrow.job(walked.id);
        }
        if (!walked.honest) honest = false;
        if (!honest) walked.honest = false;
        Anchor storage added = anchors[walked.id].push();
        added.epoch = uint64(job.lastEpoch + 1 + _below(3));
        uint256 room = _min(job.epochLimit, job.cap - job.burnt - job.settledTotal);
        uint256 total = job.settledTotal;
        for (uint256 k; k < 4; ++k) {
            uint256 more = _below(room / 4 + 1);
            total += more;
            walked.earned[k] = honest ? walked.earned[k] + more : _below(CAP);
            added.earnings.push(earning(accounts[k], walked.earned[k]));
        }
        bytes32 root = treeOf(walked.id, added.earnings)[0];
        anchor(settlementOf(walked.id, added.epoch, root, total, _below(6) == 0), walked.committee);
        return true;
    }

    function _repeatAnchor() private returns (bool) {
        (bool found, Walked storage walked) = _pick(E.Status.Started);
        if (!found || anchors[walked.id].length == 0) return false;
        E.JobView memory job = escrow.job(walked.id);
        Anchor storage last = anchors[walked.id][anchors[walked.id].length - 1];
        if (last.epoch != job.lastEpoch || escrow.roots(walked.id, last.epoch) == 0) return false;
        bytes32 root = treeOf(walked.id, last.earnings)[0];
        anchor(settlementOf(walked.id, last.epoch, root, job.anchoredTotal, job.isFinal), walked.committee);
        assertEq(keccak256(abi.encode(escrow.job(walked.id))), keccak256(abi.encode(job)), "no-op");
        return true;
    }

    function _claimOne() private returns (bool) {
        for (uint256 tries; tries < 6; ++tries) {
            (bool found, bytes32 jobId, uint256 a, uint256 k) = _pickClaim();
            if (!found || !_isDue(jobId, a, k)) continue;
            vm.prank(stranger);
            claim(_claim(jobId, a, k));
            return true;
        }
        return false;
    }

    function _claimMany() private returns (bool) {
        E.Claim[] memory claims = new E.Claim[](6);
        uint256 count;
        for (uint256 tries; tries < claims.length; ++tries) {
            (bool found, bytes32 jobId, uint256 a, uint256 k) = _pickClaim();
            if (!found) continue;
            (, bool claimable) = escrow.rootOf(jobId, anchors[jobId][a].epoch);
            if (claimable) claims[count++] = _claim(jobId, a, k);
        }
        assembly ("memory-safe") {
            mstore(claims, count)
        }
        uint256 before = mcc.balanceOf(address(escrow));
        uint256 amount = escrow.claimMany(claims);
        assertEq(before - mcc.balanceOf(address(escrow)), amount, "claimMany returns what it paid");
        return amount != 0;
    }

    function _refund() private returns (bool) {
        (bool found, Walked storage walked) = _pick(E.Status.Started);
        if (!found) (found, walked) = _pick(E.Status.Open);
        if (!found) return false;
        E.JobView memory job = escrow.job(walked.id);
        uint256 from = job.isFinal ? job.claimableAt : job.anchorDeadline + 1;
        if (vm.getBlockTimestamp() < from) {
            if (_below(12) != 0) return false;
            vm.warp(from);
        }
        uint256 before = mcc.balanceOf(researcher);
        escrow.refund(walked.id);
        assertEq(mcc.balanceOf(researcher) - before, escrow.job(walked.id).refunded, "refund");
        return true;
    }

    function _void() private returns (bool) {
        (bool found, Walked storage walked) = _pick(E.Status.Started);
        if (!found) return false;
        E.JobView memory job = escrow.job(walked.id);
        if (vm.getBlockTimestamp() >= job.claimableAt || escrow.roots(walked.id, uint64(job.lastEpoch)) == 0) {
            return false;
        }
        court.call(address(escrow), abi.encodeCall(JobEscrow.voidRoot, (walked.id)));
        walked.honest = false; // what its accounts earned is not in any surviving root
        return true;
    }

    function _stake() private returns (bool) {
        registry.stake(_node(), 1 + _below(2 * MINIMUM_STAKE));
        return true;
    }

    function _unbond() private returns (bool) {
        address node = _node();
        uint256 bonded = registry.nodeOf(node).bonded;
        if (bonded == 0) return false;
        vm.prank(node);
        registry.startUnbond(node, 1 + _below(_min(bonded, MINIMUM_STAKE)));
        return true;
    }

    function _withdraw() private returns (bool) {
        for (uint256 i; i < keys.length; ++i) {
            address node = vm.addr(keys[i]);
            R.Node memory stored = registry.nodeOf(node);
            if (stored.unbonding == 0 || stored.locks != 0) continue;
            if (vm.getBlockTimestamp() < stored.unbondedAt) {
                if (_below(8) != 0) continue;
                vm.warp(stored.unbondedAt);
            }
            registry.withdraw(node);
            return true;
        }
        return false;
    }

    function _slash() private returns (bool) {
        if (_below(2) == 0) return false;
        address to = _below(2) == 0 ? address(0) : carol;
        court.call(address(registry), abi.encodeCall(R.slash, (_node(), _below(MINIMUM_STAKE), to)));
        return true;
    }

    function _lockOrUnlock() private returns (bool) {
        address node = _node();
        bool locked = registry.nodeOf(node).locks != 0;
        court.call(address(registry), locked ? abi.encodeCall(R.unlock, (node)) : abi.encodeCall(R.lock, (node)));
        return true;
    }

    function _changeNode() private returns (bool) {
        address node = _node();
        registry.refreshSeats(node);
        address payout = registry.nodeOf(node).payout;
        vm.prank(payout);
        registry.setPayout(node, address(uint160(payout) ^ 2));
        vm.prank(node);
        registry.setRoles(uint8(1 + _below(3)));
        return true;
    }

    function _addNode() private returns (bool) {
        if (keys.length >= 12) return false;
        uint256 key = keys.length + 1;
        addValidator(key, MINIMUM_STAKE);
        keys.push(key);
        return true;
    }

    function _donate() private returns (bool) {
        mcc.transfer(address(escrow), 1);
        ++donated;
        return true;
    }

    function _pass(uint256 duration, uint256 blocks) private returns (bool) {
        pass(duration);
        passBlocks(blocks);
        return true;
    }

    // ------------------------------------------------------------------ choices

    function _below(uint256 limit) private returns (uint256) {
        random = uint256(keccak256(abi.encode(random)));
        return random % limit;
    }

    function _node() private returns (address) {
        return vm.addr(keys[_below(keys.length)]);
    }

    /// @dev A job in this status, beginning anywhere.
    function _pick(E.Status status) private returns (bool, Walked storage) {
        uint256 first = _below(jobs.length + 1);
        for (uint256 i; i < jobs.length; ++i) {
            Walked storage walked = jobs[(first + i) % jobs.length];
            if (escrow.job(walked.id).status == status) return (true, walked);
        }
        return (false, jobs.length == 0 ? jobs.push() : jobs[0]);
    }

    function _pickClaim() private returns (bool found, bytes32 jobId, uint256 a, uint256 k) {
        uint256 first = _below(jobs.length + 1);
        for (uint256 i; i < jobs.length; ++i) {
            jobId = jobs[(first + i) % jobs.length].id;
            uint256 count = anchors[jobId].length;
            if (count != 0) return (true, jobId, _below(count), _below(4));
        }
    }

    function _claim(bytes32 jobId, uint256 a, uint256 k) private view returns (E.Claim memory) {
        return claimOf(jobId, anchors[jobId][a].epoch, anchors[jobId][a].earnings, k);
    }

    function _isDue(bytes32 jobId, uint256 a, uint256 k) private view returns (bool) {
        Anchor storage anchored = anchors[jobId][a];
        (, bool claimable) = escrow.rootOf(jobId, anchored.epoch);
        E.JobView memory job = escrow.job(jobId);
        return claimable && job.settledTotal > job.paid
            && anchored.earnings[k].earned > escrow.claimed(jobId, accounts[k]);
    }

    function _min(uint256 a, uint256 b) private pure returns (uint256) {
        return a < b ? a : b;
    }
}
