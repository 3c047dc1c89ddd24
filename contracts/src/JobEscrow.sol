// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {IJobEscrow} from "./IJobEscrow.sol";
import {MCC} from "./MCC.sol";
import {NodeRegistry} from "./NodeRegistry.sol";

/**
 * @title JobEscrow, one isolated pot for every job
 * @notice A researcher opens a job with a deposit. `start` draws its committee from the validators'
 * stake. A quorum of the committee signs settlements: Merkle roots of what every account has earned.
 * Anybody anchors them; after the challenge window anybody claims for any account, and once nothing
 * more can be anchored anybody returns the rest to the researcher.
 *
 * Nobody owns the escrow. What leaves a job's pot never exceeds what its surviving settlements
 * promise, and never what was paid into it: `cap = burnt + paid + refunded + still claimable`.
 */
contract JobEscrow is IJobEscrow, EIP712, ReentrancyGuardTransient {
    using SafeERC20 for MCC;

    /// @dev Two words, written at `open`.
    struct Terms {
        address researcher;
        uint96 cap;
        uint96 epochLimit;
        uint32 window;
        uint40 openBlock;
        uint40 workDeadline;
        uint40 settleDeadline;
        Status status;
    }

    /// @dev One word: all that a claim reads and writes of a job, unless a root has just survived.
    struct Pot {
        uint96 settledTotal;
        uint96 paid;
        uint40 claimableAt;
        /// The last anchor is not yet counted in `settledTotal`.
        bool pending;
    }

    /// @dev One word about the last anchor.
    struct Last {
        uint96 total;
        uint64 epoch;
        bool isFinal;
    }

    /// @notice The largest committee.
    uint256 public constant MAX_COMMITTEE = 21;
    /// @notice The committee's seed is the hash of this many blocks after the opening block.
    uint256 public constant SEED_DELAY_BLOCKS = 2;
    /// @notice A job can be started until this many blocks after the opening block.
    uint256 public constant START_BLOCKS = 200;
    /// @notice The part of the cap that is burnt at the opening is one of this many, rounded up.
    uint256 public constant BURN_DIVISOR = 100;
    /// @notice Windows that fit at least between the work deadline and the settle deadline.
    uint256 public constant SETTLE_WINDOWS = 4;
    /// @notice EIP-712 type of {Settlement}.
    bytes32 public constant SETTLEMENT_TYPEHASH = keccak256(
        "Settlement(bytes32 jobId,uint32 committeeTerm,uint64 epoch,bytes32 prevRoot,bytes32 root,"
        "uint256 total,uint64 receipts,uint64 logSeq,bytes32 logHead,bytes32 dataHash,bool isFinal)"
    );

    /// @notice The token of deposits and payments.
    MCC public immutable token;
    /// @notice Where committees are drawn from.
    NodeRegistry public immutable registry;

    /// @notice keccak256(abi.encode(committee)) of a started job.
    mapping(bytes32 jobId => bytes32) public committeeHash;
    /// @notice Anchored roots by epoch; zero means none. See {rootOf} for whether one has survived.
    mapping(bytes32 jobId => mapping(uint64 epoch => bytes32)) public roots;
    /// @notice What an account has been paid from a job.
    mapping(bytes32 jobId => mapping(address account => uint256)) public claimed;

    mapping(bytes32 jobId => Terms) private _terms;
    mapping(bytes32 jobId => Pot) private _pots;
    mapping(bytes32 jobId => Last) private _lasts;

    /**
     * @param token_ The token of deposits and payments.
     * @param registry_ Where committees are drawn from.
     */
    constructor(MCC token_, NodeRegistry registry_) EIP712("meshd", "1") {
        token = token_;
        registry = registry_;
    }

    // ------------------------------------------------------------------ open, start, cancel

    /**
     * @notice Opens a job: takes `cap` from the caller and burns a hundredth of it, rounded up.
     * @param specHash Hash of the job's terms.
     * @param salt Anything; makes two jobs of equal terms different.
     * @param cap The whole deposit, burnt part included.
     * @param epochLimit The most one anchor may add to the total.
     * @param window Seconds between an anchor and the first claim against it.
     * @param workDeadline When work ends; a job cannot be started from then on.
     * @param settleDeadline When anchoring ends; at least four windows after the work deadline.
     * @return jobId keccak256(abi.encode(chain id, this escrow, researcher, specHash, salt)).
     */
    function open(
        bytes32 specHash,
        bytes32 salt,
        uint96 cap,
        uint96 epochLimit,
        uint32 window,
        uint40 workDeadline,
        uint40 settleDeadline
    ) external nonReentrant returns (bytes32 jobId) {
        return _open(specHash, salt, cap, epochLimit, window, workDeadline, settleDeadline);
    }

    /**
     * @notice {open} with an EIP-2612 permit for `cap` in the same transaction.
     * @dev A permit that somebody else has already submitted is no failure: only the allowance counts.
     */
    function openWithPermit(
        bytes32 specHash,
        bytes32 salt,
        uint96 cap,
        uint96 epochLimit,
        uint32 window,
        uint40 workDeadline,
        uint40 settleDeadline,
        uint256 permitDeadline,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external nonReentrant returns (bytes32 jobId) {
        try token.permit(msg.sender, address(this), cap, permitDeadline, v, r, s) {} catch {}
        return _open(specHash, salt, cap, epochLimit, window, workDeadline, settleDeadline);
    }

    /**
     * @notice Draws the job's committee, once, and ends cancellation. Anybody may call, from three
     * blocks after the opening to two hundred.
     * @dev The seed is the hash of the second block after the opening, the validators are those of
     * the registry epoch of that block: whoever calls, and when, changes nothing.
     */
    function start(bytes32 jobId) external {
        Terms storage terms = _terms[jobId];
        if (terms.status != Status.Open) revert JobEscrowWrongStatus(jobId, terms.status);
        uint256 seedBlock = terms.openBlock + SEED_DELAY_BLOCKS;
        if (block.number <= seedBlock) revert JobEscrowStartTooEarly(seedBlock + 1);
        if (block.number > terms.openBlock + START_BLOCKS) {
            revert JobEscrowStartTooLate(terms.openBlock + START_BLOCKS);
        }
        if (block.timestamp >= terms.workDeadline) revert JobEscrowWorkDeadlinePassed(terms.workDeadline);
        bytes32 beacon = blockhash(seedBlock);
        address[] memory committee = registry.drawCommittee(
            keccak256(abi.encode(beacon, jobId)), registry.epochOf(seedBlock), MAX_COMMITTEE
        );
        if (committee.length == 0) revert JobEscrowNoValidator();
        terms.status = Status.Started;
        committeeHash[jobId] = keccak256(abi.encode(committee));
        emit JobStarted(jobId, committee, quorumOf(committee.length), beacon);
    }

    /// @notice Returns the deposit less the burnt part. By the researcher, as long as nobody started the job.
    function cancel(bytes32 jobId) external nonReentrant {
        Terms storage terms = _terms[jobId];
        if (terms.status != Status.Open) revert JobEscrowWrongStatus(jobId, terms.status);
        if (msg.sender != terms.researcher) revert JobEscrowUnauthorized(msg.sender);
        terms.status = Status.Cancelled;
        uint256 amount = _payable(terms.cap);
        emit JobCancelled(jobId, msg.sender, amount);
        token.safeTransfer(msg.sender, amount);
    }

    // ------------------------------------------------------------------ anchor

    /**
     * @notice Anchors a settlement that a quorum of the committee has signed. Anybody may call.
     * @dev The same anchor again changes nothing. While a root is in its window no other is accepted.
     * @param settlement What was signed.
     * @param committee The job's committee as in {JobStarted}.
     * @param signerBitmap Bit i is set if committee[i] has signed.
     * @param signatures 65 bytes (r, s, v) for every set bit, lowest bit first.
     */
    function anchor(
        Settlement calldata settlement,
        address[] calldata committee,
        uint256 signerBitmap,
        bytes calldata signatures
    ) external {
        bytes32 jobId = settlement.jobId;
        if (_isAnchored(settlement)) return;
        _checkQuorum(settlement, committee, signerBitmap, signatures);
        uint256 claimableAt = _raise(settlement);
        roots[jobId][settlement.epoch] = settlement.root;
        emit Anchored(
            jobId,
            settlement.epoch,
            settlement.root,
            settlement.committeeTerm,
            settlement.prevRoot,
            settlement.total,
            settlement.receipts,
            settlement.logSeq,
            settlement.logHead,
            settlement.dataHash,
            settlement.isFinal,
            signerBitmap,
            claimableAt
        );
    }

    /// @notice Takes back the last anchor in its window, by the registry's court; the one before stands.
    function voidRoot(bytes32 jobId) external {
        if (msg.sender != registry.court()) revert JobEscrowUnauthorized(msg.sender);
        Pot storage pot = _pots[jobId];
        Last storage last = _lasts[jobId];
        uint64 epoch = last.epoch;
        if (!pot.pending || block.timestamp >= pot.claimableAt) revert JobEscrowUnknownRoot(jobId, epoch);
        bytes32 root = roots[jobId][epoch];
        delete roots[jobId][epoch];
        pot.pending = false;
        last.total = pot.settledTotal;
        last.isFinal = false;
        emit RootVoided(jobId, epoch, root);
    }

    // ------------------------------------------------------------------ claim, refund

    /**
     * @notice Pays an account what a surviving root says it earned and it has not been paid yet.
     * Anybody may call, for any account.
     * @return amount What was paid.
     */
    function claim(
        bytes32 jobId,
        uint64 epoch,
        address account,
        uint256 earned,
        bytes32 receiptsRoot,
        bytes32[] calldata proof
    ) external nonReentrant returns (uint256 amount) {
        amount = _redeem(jobId, epoch, account, earned, receiptsRoot, proof);
        if (amount == 0) revert JobEscrowNothingToClaim(jobId, account);
        token.safeTransfer(account, amount);
    }

    /**
     * @notice {claim} for many accounts and jobs. Those with nothing left to claim are passed over,
     * so that somebody else's claim in front does not undo the rest.
     * @dev Claims of one account that follow one another are paid by one transfer.
     * @return amount The sum of what was paid.
     */
    function claimMany(Claim[] calldata claims) external nonReentrant returns (uint256 amount) {
        address payee;
        uint256 due;
        for (uint256 index; index < claims.length; ++index) {
            Claim calldata one = claims[index];
            if (one.account != payee) {
                if (due != 0) token.safeTransfer(payee, due);
                (payee, amount, due) = (one.account, amount + due, 0);
            }
            due += _redeem(one.jobId, one.epoch, one.account, one.earned, one.receiptsRoot, one.proof);
        }
        if (due != 0) token.safeTransfer(payee, due);
        amount += due;
    }

    /**
     * @notice Returns to the researcher what no surviving settlement promises, once. Anybody may call,
     * after a final settlement's window or after the anchor deadline. All claims stay payable.
     * @return amount What was returned.
     */
    function refund(bytes32 jobId) external nonReentrant returns (uint256 amount) {
        Terms storage terms = _terms[jobId];
        if (terms.status != Status.Open && terms.status != Status.Started) {
            revert JobEscrowWrongStatus(jobId, terms.status);
        }
        Pot memory pot = _pots[jobId];
        if (_lasts[jobId].isFinal) {
            if (block.timestamp < pot.claimableAt) revert JobEscrowWindowOpen(pot.claimableAt);
        } else {
            uint256 deadline = _anchorDeadline(terms, pot);
            if (block.timestamp <= deadline) revert JobEscrowNotRefundable(deadline);
        }
        _settle(jobId, pot);
        _pots[jobId] = pot;
        terms.status = Status.Refunded;
        amount = _payable(terms.cap) - pot.settledTotal;
        emit Refunded(jobId, terms.researcher, amount);
        token.safeTransfer(terms.researcher, amount);
    }

    // ------------------------------------------------------------------ views

    /// @notice The id a job has, or would have.
    function jobIdOf(address researcher, bytes32 specHash, bytes32 salt) public view returns (bytes32) {
        return keccak256(abi.encode(block.chainid, address(this), researcher, specHash, salt));
    }

    /// @notice Everything about a job as of the present block; status None if there is no such job.
    function job(bytes32 jobId) external view returns (JobView memory) {
        Terms storage terms = _terms[jobId];
        Pot memory pot = _pots[jobId];
        Last storage last = _lasts[jobId];
        uint256 limit = _payable(terms.cap);
        _settle(jobId, pot);
        uint256 refunded;
        if (terms.status == Status.Cancelled) refunded = limit;
        if (terms.status == Status.Refunded) refunded = limit - pot.settledTotal;
        return JobView({
            status: terms.status,
            researcher: terms.researcher,
            cap: terms.cap,
            burnt: terms.cap - limit,
            epochLimit: terms.epochLimit,
            window: terms.window,
            openBlock: terms.openBlock,
            workDeadline: terms.workDeadline,
            settleDeadline: terms.settleDeadline,
            committeeHash: committeeHash[jobId],
            lastEpoch: last.epoch,
            anchoredTotal: last.total,
            settledTotal: pot.settledTotal,
            paid: pot.paid,
            refunded: refunded,
            claimableAt: pot.claimableAt,
            isFinal: last.isFinal,
            anchorDeadline: _anchorDeadline(terms, pot)
        });
    }

    /// @notice The root of an epoch, zero if none is anchored, and whether claims against it are paid.
    function rootOf(bytes32 jobId, uint64 epoch) external view returns (bytes32 root, bool claimable) {
        root = roots[jobId][epoch];
        claimable = root != 0 && !(_inWindow(_pots[jobId]) && epoch == _lasts[jobId].epoch);
    }

    /// @notice The least number of signatures of a committee of `members`: two thirds, rounded up.
    function quorumOf(uint256 members) public pure returns (uint256) {
        return (2 * members + 2) / 3;
    }

    /// @notice The EIP-712 digest that committee members sign.
    function settlementDigest(Settlement calldata settlement) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(SETTLEMENT_TYPEHASH, settlement)));
    }

    /// @notice The leaf of an account: hashed twice, as OpenZeppelin's standard Merkle tree does.
    function leafOf(bytes32 jobId, address account, uint256 earned, bytes32 receiptsRoot)
        public
        pure
        returns (bytes32)
    {
        return keccak256(bytes.concat(keccak256(abi.encode(jobId, account, earned, receiptsRoot))));
    }

    // ------------------------------------------------------------------ internals

    function _open(
        bytes32 specHash,
        bytes32 salt,
        uint96 cap,
        uint96 epochLimit,
        uint32 window,
        uint40 workDeadline,
        uint40 settleDeadline
    ) private returns (bytes32 jobId) {
        jobId = jobIdOf(msg.sender, specHash, salt);
        Terms storage terms = _terms[jobId];
        if (terms.status != Status.None) revert JobEscrowJobExists(jobId);
        uint256 burnt = cap - _payable(cap);
        if (cap <= burnt) revert JobEscrowCapTooSmall(cap);
        if (epochLimit == 0) revert JobEscrowZeroEpochLimit();
        if (window == 0) revert JobEscrowZeroWindow();
        if (workDeadline <= block.timestamp) revert JobEscrowWorkDeadlinePassed(workDeadline);
        uint256 earliest = workDeadline + SETTLE_WINDOWS * window;
        if (settleDeadline < earliest) revert JobEscrowSettleDeadlineTooEarly(settleDeadline, earliest);
        _terms[jobId] = Terms({
            researcher: msg.sender,
            cap: cap,
            epochLimit: epochLimit,
            window: window,
            openBlock: uint40(block.number),
            workDeadline: workDeadline,
            settleDeadline: settleDeadline,
            status: Status.Open
        });
        emit JobOpened(
            jobId, msg.sender, specHash, salt, cap, burnt, epochLimit, window, workDeadline, settleDeadline
        );
        uint256 before = token.balanceOf(address(this));
        token.safeTransferFrom(msg.sender, address(this), cap);
        uint256 received = token.balanceOf(address(this)) - before;
        if (received != cap) revert JobEscrowDepositMismatch(cap, received);
        token.burn(burnt);
    }

    /// @dev Whether this very anchor stands already. Of the last one its total and finality are known too.
    function _isAnchored(Settlement calldata settlement) private view returns (bool) {
        bytes32 root = roots[settlement.jobId][settlement.epoch];
        if (root == 0 || root != settlement.root) return false;
        Last memory last = _lasts[settlement.jobId];
        return settlement.epoch < last.epoch
            || (settlement.total == last.total && settlement.isFinal == last.isFinal);
    }

    function _checkQuorum(
        Settlement calldata settlement,
        address[] calldata committee,
        uint256 signerBitmap,
        bytes calldata signatures
    ) private view {
        // A committee never changes yet; the field is there so that rotation need not change the struct.
        if (settlement.committeeTerm != 0) revert JobEscrowWrongCommitteeTerm(settlement.committeeTerm);
        if (keccak256(abi.encode(committee)) != committeeHash[settlement.jobId]) {
            revert JobEscrowWrongCommittee(settlement.jobId);
        }
        if (signerBitmap >> committee.length != 0) revert JobEscrowInvalidSignerBitmap(signerBitmap);
        bytes32 digest = settlementDigest(settlement);
        uint256 signers;
        for (uint256 index; index < committee.length; ++index) {
            if ((signerBitmap >> index) & 1 == 0) continue;
            uint256 offset = 65 * signers++;
            if (signatures.length < offset + 65) revert JobEscrowInvalidSignature(committee[index]);
            (address signer, ECDSA.RecoverError problem,) =
                ECDSA.tryRecoverCalldata(digest, signatures[offset:offset + 65]);
            if (problem != ECDSA.RecoverError.NoError || signer != committee[index]) {
                revert JobEscrowInvalidSignature(committee[index]);
            }
        }
        if (signatures.length != 65 * signers) revert JobEscrowInvalidSignerBitmap(signerBitmap);
        uint256 quorum = quorumOf(committee.length);
        if (signers < quorum) revert JobEscrowQuorumNotReached(signers, quorum);
    }

    /// @dev Checks a settlement against the job's terms and its last anchor, and makes it the last one.
    function _raise(Settlement calldata settlement) private returns (uint256 claimableAt) {
        bytes32 jobId = settlement.jobId;
        Terms storage terms = _terms[jobId];
        Pot memory pot = _pots[jobId];
        Last memory last = _lasts[jobId];
        if (terms.status != Status.Started) revert JobEscrowWrongStatus(jobId, terms.status);
        if (last.isFinal) revert JobEscrowFinalised(jobId);
        uint256 deadline = _anchorDeadline(terms, pot);
        if (block.timestamp > deadline) revert JobEscrowAnchorDeadlinePassed(deadline);
        if (settlement.root == 0) revert JobEscrowZeroRoot();
        if (settlement.epoch <= last.epoch) revert JobEscrowEpochNotIncreasing(settlement.epoch, last.epoch);
        if (_inWindow(pot)) revert JobEscrowWindowOpen(pot.claimableAt);
        _settle(jobId, pot);
        uint256 total = settlement.total;
        if (total < pot.settledTotal) revert JobEscrowTotalDecreased(total, pot.settledTotal);
        uint256 raised = total - pot.settledTotal;
        if (raised > terms.epochLimit) revert JobEscrowEpochLimitExceeded(raised, terms.epochLimit);
        uint256 limit = _payable(terms.cap);
        if (total > limit) revert JobEscrowPotExceeded(total, limit);
        claimableAt = block.timestamp + terms.window;
        (pot.claimableAt, pot.pending) = (uint40(claimableAt), true);
        _pots[jobId] = pot;
        _lasts[jobId] = Last(uint96(total), settlement.epoch, settlement.isFinal);
    }

    /// @dev Books a claim; the caller transfers. A root never pays more in sum than the settled total,
    /// however its leaves add up: roots that contradict one another share one total, and no root
    /// reaches another job's pot.
    function _redeem(
        bytes32 jobId,
        uint64 epoch,
        address account,
        uint256 earned,
        bytes32 receiptsRoot,
        bytes32[] calldata proof
    ) private returns (uint256 amount) {
        bytes32 root = roots[jobId][epoch];
        if (root == 0) revert JobEscrowUnknownRoot(jobId, epoch);
        Pot storage pot = _pots[jobId];
        (uint256 settledTotal, uint256 paid, bool pending) = (pot.settledTotal, pot.paid, pot.pending);
        if (pending) {
            // The root in its window, if there is one, pays nothing yet; one that survived it counts now.
            Last storage last = _lasts[jobId];
            uint256 claimableAt = pot.claimableAt;
            if (block.timestamp >= claimableAt) (settledTotal, pending) = (last.total, false);
            else if (epoch == last.epoch) revert JobEscrowWindowOpen(claimableAt);
        }
        if (!MerkleProof.verifyCalldata(proof, root, leafOf(jobId, account, earned, receiptsRoot))) {
            revert JobEscrowInvalidProof(jobId, account);
        }
        uint256 before = claimed[jobId][account];
        if (earned <= before) return 0;
        amount = Math.min(earned - before, settledTotal - paid);
        if (amount == 0) return 0;
        (pot.settledTotal, pot.paid, pot.pending) = (uint96(settledTotal), uint96(paid + amount), pending);
        claimed[jobId][account] = before + amount;
        emit Claimed(jobId, account, epoch, amount, before + amount);
    }

    /// @dev Counts the last anchor in the settled total once its window has passed; in memory only.
    function _settle(bytes32 jobId, Pot memory pot) private view {
        if (!pot.pending || block.timestamp < pot.claimableAt) return;
        pot.settledTotal = _lasts[jobId].total;
        pot.pending = false;
    }

    function _inWindow(Pot memory pot) private view returns (bool) {
        return pot.pending && block.timestamp < pot.claimableAt;
    }

    /// @dev The settle deadline, or one window after the last anchor's window if that is later: whoever
    /// anchors an old settlement in the last moment cannot shut out the one that follows it.
    function _anchorDeadline(Terms storage terms, Pot memory pot) private view returns (uint256 deadline) {
        deadline = terms.settleDeadline;
        uint256 claimableAt = pot.claimableAt;
        if (claimableAt != 0 && claimableAt + terms.window > deadline) deadline = claimableAt + terms.window;
    }

    /// @dev What a job can pay out: the cap less a hundredth of it, rounded up.
    function _payable(uint256 cap) private pure returns (uint256) {
        return cap - (cap + BURN_DIVISOR - 1) / BURN_DIVISOR;
    }
}
