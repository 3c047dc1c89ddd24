// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/**
 * @title IJobEscrow, the types, events and errors of {JobEscrow}
 */
interface IJobEscrow {
    enum Status {
        /// No such job.
        None,
        /// Deposited; can be started or cancelled.
        Open,
        /// Its committee is drawn; settlements can be anchored.
        Started,
        /// The rest is refunded; what settlements promise stays claimable.
        Refunded,
        /// Cancelled before its start; the deposit less the burnt part is returned.
        Cancelled
    }

    /// @notice What a committee signs. `total` is the sum of all leaves, `epoch` the number of the cut.
    struct Settlement {
        bytes32 jobId;
        uint32 committeeTerm;
        uint64 epoch;
        bytes32 prevRoot;
        bytes32 root;
        uint256 total;
        uint64 receipts;
        uint64 logSeq;
        bytes32 logHead;
        bytes32 dataHash;
        bool isFinal;
    }

    /// @notice One leaf of a root with its proof. `earned` is cumulative over all epochs of the job.
    struct Claim {
        bytes32 jobId;
        uint64 epoch;
        address account;
        uint256 earned;
        bytes32 receiptsRoot;
        bytes32[] proof;
    }

    /// @notice What {JobEscrow-job} returns; amounts in the token's smallest unit, times in unix seconds.
    struct JobView {
        Status status;
        address researcher;
        uint256 cap;
        uint256 burnt;
        uint256 epochLimit;
        uint256 window;
        uint256 openBlock;
        uint256 workDeadline;
        uint256 settleDeadline;
        /// Hash of the committee; zero before the start.
        bytes32 committeeHash;
        /// Epoch of the last anchor; zero before the first.
        uint256 lastEpoch;
        /// Total of the last anchor, in its window or not.
        uint256 anchoredTotal;
        /// Total of the last anchor that has survived its window: the bound of all claims.
        uint256 settledTotal;
        uint256 paid;
        uint256 refunded;
        /// When the last anchor's window ends.
        uint256 claimableAt;
        /// Whether the last anchor is a final one: nothing can be anchored after it.
        bool isFinal;
        /// The last second in which a settlement can be anchored, unless a final one is.
        uint256 anchorDeadline;
    }

    event JobOpened(
        bytes32 indexed jobId,
        address indexed researcher,
        bytes32 indexed specHash,
        bytes32 salt,
        uint256 cap,
        uint256 burnt,
        uint256 epochLimit,
        uint256 window,
        uint256 workDeadline,
        uint256 settleDeadline
    );
    event JobStarted(bytes32 indexed jobId, address[] committee, uint256 quorum, bytes32 beacon);
    event JobCancelled(bytes32 indexed jobId, address indexed researcher, uint256 amount);
    event Anchored(
        bytes32 indexed jobId,
        uint64 indexed epoch,
        bytes32 indexed root,
        uint32 committeeTerm,
        bytes32 prevRoot,
        uint256 total,
        uint64 receipts,
        uint64 logSeq,
        bytes32 logHead,
        bytes32 dataHash,
        bool isFinal,
        uint256 signerBitmap,
        uint256 claimableAt
    );
    event Claimed(bytes32 indexed jobId, address indexed account, uint64 indexed epoch, uint256 amount, uint256 total);
    event Refunded(bytes32 indexed jobId, address indexed researcher, uint256 amount);
    event RootVoided(bytes32 indexed jobId, uint64 indexed epoch, bytes32 root);

    error JobEscrowJobExists(bytes32 jobId);
    error JobEscrowCapTooSmall(uint256 cap);
    error JobEscrowZeroEpochLimit();
    error JobEscrowZeroWindow();
    error JobEscrowWorkDeadlinePassed(uint256 workDeadline);
    error JobEscrowSettleDeadlineTooEarly(uint256 settleDeadline, uint256 earliest);
    error JobEscrowDepositMismatch(uint256 expected, uint256 received);
    error JobEscrowWrongStatus(bytes32 jobId, Status status);
    error JobEscrowUnauthorized(address caller);
    error JobEscrowStartTooEarly(uint256 firstBlock);
    error JobEscrowStartTooLate(uint256 lastBlock);
    error JobEscrowNoValidator();
    error JobEscrowWrongCommittee(bytes32 jobId);
    error JobEscrowWrongCommitteeTerm(uint32 committeeTerm);
    error JobEscrowInvalidSignerBitmap(uint256 signerBitmap);
    error JobEscrowQuorumNotReached(uint256 signers, uint256 quorum);
    error JobEscrowInvalidSignature(address signer);
    error JobEscrowZeroRoot();
    error JobEscrowFinalised(bytes32 jobId);
    error JobEscrowAnchorDeadlinePassed(uint256 anchorDeadline);
    error JobEscrowEpochNotIncreasing(uint64 epoch, uint64 lastEpoch);
    error JobEscrowWindowOpen(uint256 claimableAt);
    error JobEscrowTotalDecreased(uint256 total, uint256 settledTotal);
    error JobEscrowEpochLimitExceeded(uint256 raise, uint256 epochLimit);
    error JobEscrowPotExceeded(uint256 total, uint256 pot);
    error JobEscrowUnknownRoot(bytes32 jobId, uint64 epoch);
    error JobEscrowInvalidProof(bytes32 jobId, address account);
    error JobEscrowNothingToClaim(bytes32 jobId, address account);
    error JobEscrowNotRefundable(uint256 refundableAfter);
}
