// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IJobEscrow} from "../../src/IJobEscrow.sol";
import {JobEscrow} from "../../src/JobEscrow.sol";
import {MCC} from "../../src/MCC.sol";
import {NodeRegistry} from "../../src/NodeRegistry.sol";
import {Assert} from "./Assert.sol";
import {Deploy} from "./Deploy.sol";
import {Tree} from "./Tree.sol";
import {vm} from "./Vm.sol";

/// @notice A court that does what a test tells it.
contract Court {
    function call(address target, bytes calldata data) external {
        (bool done, bytes memory result) = target.call(data);
        if (!done) {
            assembly ("memory-safe") {
                revert(add(result, 32), mload(result))
            }
        }
    }
}

/// @notice The deployed contracts, staked validators, and a researcher with a job: what tests begin with.
abstract contract Swarm is Assert {
    uint96 internal constant CAP = 1000e18;
    uint96 internal constant POT = 990e18;
    uint96 internal constant EPOCH_LIMIT = 400e18;
    uint32 internal constant WINDOW = 5;
    uint256 internal constant EPOCH_BLOCKS = 5;
    uint256 internal constant UNBONDING = 1 days;
    uint256 internal constant MINIMUM_STAKE = 100e18;
    bytes32 internal constant SPEC = keccak256("spec");
    bytes32 internal constant SALT = keccak256("salt");
    /// @dev Half the order of secp256k1; signatures above it are the malleable twins.
    uint256 internal constant ORDER = 0xfffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141;

    MCC internal mcc;
    NodeRegistry internal registry;
    JobEscrow internal escrow;
    Court internal court;

    address internal researcher = vm.addr(1001);
    address internal alice = vm.addr(1002);
    address internal bob = vm.addr(1003);
    address internal carol = vm.addr(1004);
    address internal stranger = vm.addr(1005);

    /// @dev Private keys of the validators by their address.
    mapping(address validator => uint256) internal keyOf;

    struct Earning {
        address account;
        uint256 earned;
    }

    function deploy() internal {
        vm.warp(1_800_000_000);
        vm.roll(1000);
        mcc = Deploy.mcc(address(this));
        registry = Deploy.nodeRegistry(mcc, EPOCH_BLOCKS, UNBONDING, MINIMUM_STAKE);
        escrow = Deploy.jobEscrow(mcc, registry);
        court = new Court();
        mcc.approve(address(registry), type(uint256).max);
        mcc.transfer(researcher, 1_000_000e18);
        vm.prank(researcher);
        mcc.approve(address(escrow), type(uint256).max);
    }

    function addValidators(uint256 count) internal {
        for (uint256 i = 1; i <= count; ++i) {
            addValidator(i, MINIMUM_STAKE);
        }
        passEpoch();
    }

    function addValidator(uint256 key, uint256 stake) internal returns (address node) {
        node = vm.addr(key);
        keyOf[node] = key;
        vm.prank(node);
        registry.register(2, payoutOf(node));
        registry.stake(node, stake);
    }

    function payoutOf(address node) internal pure returns (address) {
        return address(uint160(node) ^ 1);
    }

    function appointCourt() internal {
        registry.appointCourt(address(court));
        pass(UNBONDING);
    }

    function pass(uint256 duration) internal {
        vm.warp(vm.getBlockTimestamp() + duration);
    }

    function passBlocks(uint256 blocks) internal {
        vm.roll(vm.getBlockNumber() + blocks);
    }

    function passEpoch() internal {
        uint256 number = vm.getBlockNumber();
        vm.roll(number - (number % EPOCH_BLOCKS) + EPOCH_BLOCKS);
    }

    function workDeadline() internal view returns (uint40) {
        return uint40(vm.getBlockTimestamp() + 600);
    }

    /// @dev Opens a job whose deadlines are 600 s and 600 s + 4 windows away.
    function open(bytes32 salt) internal returns (bytes32) {
        uint40 work = workDeadline();
        vm.prank(researcher);
        return escrow.open(SPEC, salt, CAP, EPOCH_LIMIT, WINDOW, work, work + 4 * WINDOW);
    }

    function openAndStart(bytes32 salt) internal returns (bytes32 jobId, address[] memory committee) {
        jobId = open(salt);
        passBlocks(3);
        committee = start(jobId);
    }

    /// @dev The committee as JobStarted names it.
    function start(bytes32 jobId) internal returns (address[] memory committee) {
        vm.recordLogs();
        escrow.start(jobId);
        (committee,,) = abi.decode(vm.getRecordedLogs()[0].data, (address[], uint256, bytes32));
    }

    function settlementOf(bytes32 jobId, uint64 epoch, bytes32 root, uint256 total, bool isFinal)
        internal
        pure
        returns (IJobEscrow.Settlement memory)
    {
        return IJobEscrow.Settlement({
            jobId: jobId,
            committeeTerm: 0,
            epoch: epoch,
            prevRoot: bytes32(0),
            root: root,
            total: total,
            receipts: 7,
            logSeq: 11,
            logHead: keccak256("log head"),
            dataHash: keccak256("data"),
            isFinal: isFinal
        });
    }

    /// @dev Signatures of the members in the bitmap, in committee order.
    function sign(IJobEscrow.Settlement memory settlement, address[] memory committee, uint256 bitmap)
        internal
        view
        returns (bytes memory signatures)
    {
        bytes32 digest = escrow.settlementDigest(settlement);
        for (uint256 i; i < committee.length; ++i) {
            if ((bitmap >> i) & 1 == 1) {
                signatures = bytes.concat(signatures, signatureOf(keyOf[committee[i]], digest));
            }
        }
    }

    function signatureOf(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }

    function quorumBitmap(address[] memory committee) internal pure returns (uint256) {
        return (1 << ((2 * committee.length + 2) / 3)) - 1;
    }

    function anchor(IJobEscrow.Settlement memory settlement, address[] memory committee) internal {
        uint256 bitmap = quorumBitmap(committee);
        escrow.anchor(settlement, committee, bitmap, sign(settlement, committee, bitmap));
    }

    function expectAnchorRevert(
        IJobEscrow.Settlement memory settlement,
        address[] memory committee,
        bytes memory reason
    ) internal {
        uint256 bitmap = quorumBitmap(committee);
        bytes memory signatures = sign(settlement, committee, bitmap);
        vm.expectRevert(reason);
        escrow.anchor(settlement, committee, bitmap, signatures);
    }

    function earning(address account, uint256 earned) internal pure returns (Earning memory) {
        return Earning(account, earned);
    }

    function list(Earning memory one) internal pure returns (Earning[] memory earnings) {
        earnings = new Earning[](1);
        earnings[0] = one;
    }

    function list(Earning memory one, Earning memory two) internal pure returns (Earning[] memory earnings) {
        earnings = new Earning[](2);
        (earnings[0], earnings[1]) = (one, two);
    }

    function list(Earning memory one, Earning memory two, Earning memory three)
        internal
        pure
        returns (Earning[] memory earnings)
    {
        earnings = new Earning[](3);
        (earnings[0], earnings[1], earnings[2]) = (one, two, three);
    }

    function sumOf(Earning[] memory earnings) internal pure returns (uint256 total) {
        for (uint256 i; i < earnings.length; ++i) {
            total += earnings[i].earned;
        }
    }

    function receiptsRootOf(address account) internal pure returns (bytes32) {
        return keccak256(abi.encode("receipts", account));
    }

    function leafOf(bytes32 jobId, Earning memory one) internal pure returns (bytes32) {
        bytes32 inner = keccak256(abi.encode(jobId, one.account, one.earned, receiptsRootOf(one.account)));
        return keccak256(abi.encode(inner));
    }

    function treeOf(bytes32 jobId, Earning[] memory earnings) internal pure returns (bytes32[] memory) {
        bytes32[] memory leaves = new bytes32[](earnings.length);
        for (uint256 i; i < earnings.length; ++i) {
            leaves[i] = leafOf(jobId, earnings[i]);
        }
        return Tree.build(leaves);
    }

    /// @dev Anchors earnings that add up to their total, with a quorum.
    function anchorEarnings(
        bytes32 jobId,
        address[] memory committee,
        uint64 epoch,
        Earning[] memory earnings,
        bool isFinal
    ) internal {
        anchor(settlementOf(jobId, epoch, treeOf(jobId, earnings)[0], sumOf(earnings), isFinal), committee);
    }

    function claimOf(bytes32 jobId, uint64 epoch, Earning[] memory earnings, uint256 index)
        internal
        pure
        returns (IJobEscrow.Claim memory)
    {
        Earning memory one = earnings[index];
        bytes32[] memory path = Tree.proof(treeOf(jobId, earnings), leafOf(jobId, one));
        return IJobEscrow.Claim(jobId, epoch, one.account, one.earned, receiptsRootOf(one.account), path);
    }

    function claim(IJobEscrow.Claim memory one) internal returns (uint256) {
        return escrow.claim(one.jobId, one.epoch, one.account, one.earned, one.receiptsRoot, one.proof);
    }

    /// @dev deposited = burnt + paid + refunded + what is still in the pot, to the last unit.
    function assertExact(bytes32 jobId, uint256 inPot) internal view {
        IJobEscrow.JobView memory job = escrow.job(jobId);
        assertEq(job.cap, job.burnt + job.paid + job.refunded + inPot, "deposited");
    }
}
