// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "../src/IJobEscrow.sol";
import {Tree} from "./support/Tree.sol";
import {Swarm} from "./support/Swarm.sol";
import {vm} from "./support/Vm.sol";

/// @notice The gas of whole transactions (isolated: intrinsic and calldata gas counted, storage cold),
/// written to out/gas and compared with gas-snapshot by test.cjs.
/// forge-config: default.isolate = true
contract JobEscrowGasTest is Swarm {
    bytes32 private jobId;
    address[] private committee;

    function setUp() public {
        deploy();
        addValidators(3);
        (jobId, committee) = openAndStart(SALT);
    }

    function test_open() public {
        open(keccak256("another"));
        vm.snapshotGasLastCall("open");
    }

    function test_start() public {
        bytes32 other = open(keccak256("another"));
        passBlocks(3);
        escrow.start(other);
        vm.snapshotGasLastCall("start, 3 validators");
    }

    function test_anchor() public {
        anchor(settlementOf(jobId, 1, keccak256("1"), 1, false), committee);
        vm.snapshotGasLastCall("anchor, first epoch, 2 of 3 signatures");
        pass(WINDOW);
        anchor(settlementOf(jobId, 2, keccak256("2"), 2, false), committee);
        pass(WINDOW);
        anchor(settlementOf(jobId, 3, keccak256("3"), 3, false), committee);
        vm.snapshotGasLastCall("anchor, later epochs, 2 of 3 signatures");
    }

    function test_claimAgainOf1() public {
        _claimAgain(1, "claim again, 1 worker");
    }

    function test_claimAgainOf100() public {
        _claimAgain(100, "claim again, 100 workers");
    }

    function test_claimAgainOf1000() public {
        _claimAgain(1000, "claim again, 1000 workers");
    }

    function test_claimManyOf20() public {
        IJobEscrow.Claim[] memory claims = new IJobEscrow.Claim[](20);
        for (uint64 epoch = 1; epoch <= 2; ++epoch) {
            Earning[] memory earnings = _earnings(1000, epoch);
            bytes32[] memory tree = treeOf(jobId, earnings);
            anchor(settlementOf(jobId, epoch, tree[0], sumOf(earnings), false), committee);
            pass(WINDOW);
            for (uint256 i; i < claims.length; ++i) {
                claims[i] = _claim(epoch, tree, earnings[i]);
            }
            escrow.claimMany(claims);
        }
        vm.snapshotGasLastCall("claimMany of 20 again, 1000 workers, one job");
    }

    /// @dev One account with claims in twenty jobs, as an aggregator's or a worker's daemon sends them.
    function test_claimManyOf20Jobs() public {
        IJobEscrow.Claim[] memory claims = new IJobEscrow.Claim[](20);
        bytes32[] memory jobs = new bytes32[](claims.length);
        address[][] memory committees = new address[][](claims.length);
        for (uint256 i; i < claims.length; ++i) {
            jobs[i] = open(bytes32(i));
        }
        passBlocks(3);
        for (uint256 i; i < claims.length; ++i) {
            committees[i] = start(jobs[i]);
        }
        for (uint64 epoch = 1; epoch <= 2; ++epoch) {
            for (uint256 i; i < claims.length; ++i) {
                Earning[] memory earnings = list(earning(alice, epoch), earning(bob, epoch));
                anchorEarnings(jobs[i], committees[i], epoch, earnings, false);
                claims[i] = claimOf(jobs[i], epoch, earnings, 0);
            }
            pass(WINDOW);
            escrow.claimMany(claims);
        }
        vm.snapshotGasLastCall("claimMany of 20 again, 2 workers, 20 jobs");
    }

    function test_refund() public {
        anchorEarnings(jobId, committee, 1, list(earning(alice, 1e18)), true);
        pass(WINDOW);
        escrow.refund(jobId);
        vm.snapshotGasLastCall("refund");
    }

    function test_registry() public {
        uint256 key = 77;
        keyOf[vm.addr(key)] = key;
        vm.prank(vm.addr(key));
        registry.register(2, alice);
        vm.snapshotGasLastCall("register");
        registry.stake(vm.addr(key), MINIMUM_STAKE);
        vm.snapshotGasLastCall("stake, first time");
    }

    /// @dev Pays once, so that no account or counter is new, then measures the second claim.
    function _claimAgain(uint256 workers, string memory name) private {
        for (uint64 epoch = 1; epoch <= 2; ++epoch) {
            Earning[] memory earnings = _earnings(workers, epoch);
            bytes32[] memory tree = treeOf(jobId, earnings);
            anchor(settlementOf(jobId, epoch, tree[0], sumOf(earnings), false), committee);
            pass(WINDOW);
            // Somebody else's claim has settled the root already.
            if (workers > 1) claim(_claim(epoch, tree, earnings[1]));
            claim(_claim(epoch, tree, earnings[0]));
        }
        vm.snapshotGasLastCall(name);
    }

    function _earnings(uint256 workers, uint256 epoch) private pure returns (Earning[] memory earnings) {
        earnings = new Earning[](workers);
        for (uint256 i; i < workers; ++i) {
            address account = address(uint160(uint256(keccak256(abi.encode("worker", i)))));
            earnings[i] = Earning(account, epoch * 0.12345678901234567e18);
        }
    }

    function _claim(uint64 epoch, bytes32[] memory tree, Earning memory one)
        private
        view
        returns (IJobEscrow.Claim memory)
    {
        bytes32[] memory path = Tree.proof(tree, leafOf(jobId, one));
        return IJobEscrow.Claim(jobId, epoch, one.account, one.earned, receiptsRootOf(one.account), path);
    }
}
