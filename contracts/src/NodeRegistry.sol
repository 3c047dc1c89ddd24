// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {MCC} from "./MCC.sol";
import {Seats} from "./Seats.sol";

/**
 * @title NodeRegistry, who may orchestrate and validate, and what they stake on it
 * @notice A node is its key's address. It registers itself, or signs a registration that anybody
 * sends. Money only ever leaves to its payout address, which only the present payout address can
 * change: the key on a daemon's disk cannot move stake. Every change of stake or roles counts from
 * the next registry epoch, and the set of every past epoch stays readable, so nobody can change a
 * committee after its seed is known. Workers do not register.
 *
 * Nobody owns the registry. Its deployer can appoint one court, once; the court's power begins one
 * unbonding time later, so whoever does not accept it can leave before.
 */
contract NodeRegistry is EIP712, ReentrancyGuardTransient {
    using SafeCast for uint256;
    using SafeERC20 for MCC;
    using Seats for Seats.Book;

    struct Node {
        /// The only address stake is ever paid to; zero means not registered.
        address payout;
        /// {ORCHESTRATOR} and {VALIDATOR} bits.
        uint8 roles;
        /// Open disputes; stake cannot be withdrawn while there is one.
        uint32 locks;
        /// Stake that counts for roles.
        uint96 bonded;
        /// Stake on its way out: still slashable, no longer counted.
        uint96 unbonding;
        /// When the unbonding stake may be withdrawn, in unix seconds.
        uint40 unbondedAt;
        /// What was bonded in the epochs before `since`.
        uint96 bondedBefore;
        /// The first epoch in which `bonded` counts.
        uint48 since;
    }

    /// @notice Role bit of a node that may take jobs and keep their logs.
    uint8 public constant ORCHESTRATOR = 1;
    /// @notice Role bit of a node that may be drawn into committees.
    uint8 public constant VALIDATOR = 2;
    /// @notice The largest number of active nodes of one role; a heavier newcomer replaces the lightest.
    uint256 public constant MAX_SEATS = Seats.MAX;
    /// @notice What a node signs for {registerBySig}.
    bytes32 public constant REGISTRATION_TYPEHASH =
        keccak256("NodeRegistration(address node,uint8 roles,address payout,uint256 deadline)");
    /// @notice The unit of a draw's weight: one whole MCC.
    uint256 public constant WEIGHT_UNIT = 1e18;

    /// @notice The token that is staked.
    MCC public immutable token;
    /// @notice Blocks in a registry epoch.
    uint256 public immutable epochBlocks;
    /// @notice Seconds between {startUnbond} and {withdraw}; longer than any job's window plus retention.
    uint256 public immutable unbondingSeconds;
    /// @notice Stake from which on a node's roles are active.
    uint256 public immutable minimumStake;
    /// @notice Who may appoint the court, once. It has no other power.
    address public immutable deployer;

    /// @notice The appointed court, in power from `courtFrom`; zero means none was appointed yet.
    address public appointedCourt;
    /// @notice When the appointed court's power begins, in unix seconds.
    uint40 public courtFrom;

    mapping(address node => Node) private _nodes;
    mapping(uint8 role => Seats.Book) private _books;

    event NodeRegistered(address indexed node, uint8 roles, address indexed payout);
    event RolesChanged(address indexed node, uint8 roles);
    event PayoutChanged(address indexed node, address indexed payout);
    event Staked(address indexed node, address indexed from, uint256 amount, uint256 bonded);
    event UnbondStarted(address indexed node, uint256 amount, uint256 unbondedAt);
    event Withdrawn(address indexed node, address indexed payout, uint256 amount);
    /// @notice From `epoch` on the node holds a seat of the role with this weight; zero means none.
    event SeatChanged(uint8 indexed role, address indexed node, uint256 weight, uint256 epoch);
    event CourtAppointed(address indexed court, uint256 from);
    event NodeLocked(address indexed node, uint256 locks);
    event NodeUnlocked(address indexed node, uint256 locks);
    event Slashed(address indexed node, uint256 amount, address indexed beneficiary);

    error NodeRegistryInvalidParameter();
    error NodeRegistryAlreadyRegistered(address node);
    error NodeRegistryNotRegistered(address node);
    error NodeRegistryInvalidRoles(uint8 roles);
    error NodeRegistryInvalidPayout();
    error NodeRegistryInvalidAmount();
    error NodeRegistryInvalidSignature(address node);
    error NodeRegistrySignatureExpired(uint256 deadline);
    error NodeRegistryUnauthorized(address caller);
    error NodeRegistryDepositMismatch(uint256 expected, uint256 received);
    error NodeRegistryInsufficientStake(uint256 bonded, uint256 wanted);
    error NodeRegistryNothingToWithdraw(address node);
    error NodeRegistryStillUnbonding(uint256 unbondedAt);
    error NodeRegistryNodeLocked(address node);
    error NodeRegistryNodeNotLocked(address node);
    error NodeRegistryCourtAlreadyAppointed(address court);
    error NodeRegistryInvalidCourt(address court);

    modifier onlyCourt() {
        if (msg.sender != court()) revert NodeRegistryUnauthorized(msg.sender);
        _;
    }

    modifier onlyRegistered(address node) {
        if (_nodes[node].payout == address(0)) revert NodeRegistryNotRegistered(node);
        _;
    }

    /**
     * @param token_ The token that is staked.
     * @param epochBlocks_ Blocks in a registry epoch, at least one.
     * @param unbondingSeconds_ Seconds that unbonding takes, at least one.
     * @param minimumStake_ Stake from which on roles are active, at least one whole MCC.
     */
    constructor(MCC token_, uint256 epochBlocks_, uint256 unbondingSeconds_, uint256 minimumStake_)
        EIP712("meshd", "1")
    {
        if (
            epochBlocks_ == 0 || unbondingSeconds_ == 0 || unbondingSeconds_ > type(uint32).max
                || minimumStake_ < WEIGHT_UNIT
        ) revert NodeRegistryInvalidParameter();
        token = token_;
        epochBlocks = epochBlocks_;
        unbondingSeconds = unbondingSeconds_;
        minimumStake = minimumStake_;
        deployer = msg.sender;
    }

    // ------------------------------------------------------------------ registration

    /// @notice Registers the caller as a node, once.
    function register(uint8 roles, address payout) external {
        _register(msg.sender, roles, payout);
    }

    /**
     * @notice Registers `node` with its signature over {REGISTRATION_TYPEHASH}; anybody may pay the gas.
     * @dev A node registers once, so a signature cannot be used a second time and needs no nonce.
     */
    function registerBySig(address node, uint8 roles, address payout, uint256 deadline, bytes calldata signature)
        external
    {
        if (block.timestamp > deadline) revert NodeRegistrySignatureExpired(deadline);
        bytes32 digest =
            _hashTypedDataV4(keccak256(abi.encode(REGISTRATION_TYPEHASH, node, roles, payout, deadline)));
        (address signer, ECDSA.RecoverError problem,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (problem != ECDSA.RecoverError.NoError || signer != node) revert NodeRegistryInvalidSignature(node);
        _register(node, roles, payout);
    }

    /// @notice Changes the caller's roles from the next epoch on.
    function setRoles(uint8 roles) external onlyRegistered(msg.sender) {
        _checkRoles(roles);
        _nodes[msg.sender].roles = roles;
        emit RolesChanged(msg.sender, roles);
        _refreshSeats(msg.sender);
    }

    /// @notice Changes where the node's stake is paid to. Only the present payout address can.
    function setPayout(address node, address payout) external onlyRegistered(node) {
        if (msg.sender != _nodes[node].payout) revert NodeRegistryUnauthorized(msg.sender);
        if (payout == address(0)) revert NodeRegistryInvalidPayout();
        _nodes[node].payout = payout;
        emit PayoutChanged(node, payout);
    }

    // ------------------------------------------------------------------ stake

    /// @notice Adds the caller's tokens to the node's stake; they count from the next epoch on.
    function stake(address node, uint256 amount) external nonReentrant onlyRegistered(node) {
        if (amount == 0) revert NodeRegistryInvalidAmount();
        uint256 bonded = _nodes[node].bonded + amount;
        _setBonded(node, bonded.toUint96());
        emit Staked(node, msg.sender, amount, bonded);
        uint256 before = token.balanceOf(address(this));
        token.safeTransferFrom(msg.sender, address(this), amount);
        uint256 received = token.balanceOf(address(this)) - before;
        if (received != amount) revert NodeRegistryDepositMismatch(amount, received);
    }

    /**
     * @notice Starts to take stake out. It stops to count from the next epoch on and stays slashable
     * until it is withdrawn. A second call adds to the first and starts its time anew.
     * @dev By the node or its payout address; the tokens go to the payout address in any case.
     */
    function startUnbond(address node, uint256 amount) external onlyRegistered(node) {
        Node storage self = _nodes[node];
        if (msg.sender != node && msg.sender != self.payout) revert NodeRegistryUnauthorized(msg.sender);
        if (amount == 0) revert NodeRegistryInvalidAmount();
        uint256 bonded = self.bonded;
        if (amount > bonded) revert NodeRegistryInsufficientStake(bonded, amount);
        uint256 unbondedAt = block.timestamp + unbondingSeconds;
        self.unbonding += uint96(amount);
        self.unbondedAt = uint40(unbondedAt);
        _setBonded(node, uint96(bonded - amount));
        emit UnbondStarted(node, amount, unbondedAt);
    }

    /// @notice Pays all unbonded stake of the node to its payout address. Anybody may call.
    function withdraw(address node) external nonReentrant returns (uint256 amount) {
        Node storage self = _nodes[node];
        amount = self.unbonding;
        if (amount == 0) revert NodeRegistryNothingToWithdraw(node);
        if (block.timestamp < self.unbondedAt) revert NodeRegistryStillUnbonding(self.unbondedAt);
        if (self.locks != 0) revert NodeRegistryNodeLocked(node);
        self.unbonding = 0;
        emit Withdrawn(node, self.payout, amount);
        token.safeTransfer(self.payout, amount);
    }

    /// @notice Gives the node the seats its stake and roles deserve, for one that found them all taken.
    function refreshSeats(address node) external onlyRegistered(node) {
        _refreshSeats(node);
    }

    // ------------------------------------------------------------------ court

    /// @notice Appoints the court, once, by the deployer. Its power begins one unbonding time later.
    function appointCourt(address court_) external {
        if (msg.sender != deployer) revert NodeRegistryUnauthorized(msg.sender);
        if (appointedCourt != address(0)) revert NodeRegistryCourtAlreadyAppointed(appointedCourt);
        if (court_.code.length == 0) revert NodeRegistryInvalidCourt(court_);
        uint256 from = block.timestamp + unbondingSeconds;
        appointedCourt = court_;
        courtFrom = uint40(from);
        emit CourtAppointed(court_, from);
    }

    /// @notice Keeps the node's stake from being withdrawn until the court unlocks it as often.
    function lock(address node) external onlyCourt onlyRegistered(node) {
        uint256 locks = ++_nodes[node].locks;
        emit NodeLocked(node, locks);
    }

    /// @notice Takes back one {lock}.
    function unlock(address node) external onlyCourt {
        if (_nodes[node].locks == 0) revert NodeRegistryNodeNotLocked(node);
        uint256 locks = --_nodes[node].locks;
        emit NodeUnlocked(node, locks);
    }

    /**
     * @notice Takes up to `amount` of the node's stake, bonded first, then unbonding.
     * @param beneficiary Who receives it; zero burns it.
     * @return taken What was there to take.
     */
    function slash(address node, uint256 amount, address beneficiary)
        external
        nonReentrant
        onlyCourt
        onlyRegistered(node)
        returns (uint256 taken)
    {
        Node storage self = _nodes[node];
        uint256 bonded = self.bonded;
        uint256 fromBonded = amount < bonded ? amount : bonded;
        uint256 rest = amount - fromBonded;
        uint256 fromUnbonding = rest < self.unbonding ? rest : self.unbonding;
        taken = fromBonded + fromUnbonding;
        self.unbonding -= uint96(fromUnbonding);
        _setBonded(node, uint96(bonded - fromBonded));
        emit Slashed(node, taken, beneficiary);
        if (beneficiary == address(0)) token.burn(taken);
        else token.safeTransfer(beneficiary, taken);
    }

    // ------------------------------------------------------------------ views

    /// @notice The court in power, or zero.
    function court() public view returns (address) {
        return block.timestamp >= courtFrom ? appointedCourt : address(0);
    }

    /// @notice The registry epoch of the present block.
    function currentEpoch() public view returns (uint256) {
        return block.number / epochBlocks;
    }

    /// @notice The registry epoch that a block belongs to.
    function epochOf(uint256 blockNumber) external view returns (uint256) {
        return blockNumber / epochBlocks;
    }

    /// @notice Everything stored about a node; all zero if it is not registered.
    function nodeOf(address node) external view returns (Node memory) {
        return _nodes[node];
    }

    /// @notice Stake that counts now: bonded before this epoch, and still bonded.
    function activeStake(address node) external view returns (uint256) {
        Node storage self = _nodes[node];
        if (currentEpoch() >= self.since) return self.bonded;
        return self.bonded < self.bondedBefore ? self.bonded : self.bondedBefore;
    }

    /// @notice The active validators of this epoch, in the order of their seats.
    function validators() external view returns (address[] memory nodes) {
        (nodes,) = _books[VALIDATOR].heldIn(currentEpoch().toUint48());
    }

    /// @notice The active orchestrators of this epoch, in the order of their seats.
    function orchestrators() external view returns (address[] memory nodes) {
        (nodes,) = _books[ORCHESTRATOR].heldIn(currentEpoch().toUint48());
    }

    /// @notice The active nodes of a role in an epoch, with their weights in whole MCC.
    function activeAt(uint8 role, uint256 epoch)
        external
        view
        returns (address[] memory nodes, uint256[] memory weights)
    {
        return _books[role].heldIn(epoch.toUint48());
    }

    /**
     * @notice Draws up to `size` different validators of an epoch, by stake and without replacement.
     * @dev A pure function of its arguments for every epoch that has begun. The k-th draw takes the
     * point keccak256(abi.encode(seed, k)) modulo the weight that is left, and walks the seats in order.
     * @return committee The drawn validators in drawn order; fewer than `size` if there are fewer.
     */
    function drawCommittee(bytes32 seed, uint256 epoch, uint256 size)
        external
        view
        returns (address[] memory committee)
    {
        (address[] memory nodes, uint256[] memory weights) = _books[VALIDATOR].heldIn(epoch.toUint48());
        uint256 total;
        for (uint256 index; index < weights.length; ++index) {
            total += weights[index];
        }
        if (size > nodes.length) size = nodes.length;
        committee = new address[](size);
        for (uint256 k; k < size; ++k) {
            uint256 point = uint256(keccak256(abi.encode(seed, k))) % total;
            uint256 index;
            while (point >= weights[index]) point -= weights[index++];
            committee[k] = nodes[index];
            total -= weights[index];
            weights[index] = 0;
        }
    }

    // ------------------------------------------------------------------ internals

    function _register(address node, uint8 roles, address payout) private {
        if (_nodes[node].payout != address(0)) revert NodeRegistryAlreadyRegistered(node);
        if (payout == address(0)) revert NodeRegistryInvalidPayout();
        _checkRoles(roles);
        _nodes[node].payout = payout;
        _nodes[node].roles = roles;
        emit NodeRegistered(node, roles, payout);
    }

    function _checkRoles(uint8 roles) private pure {
        if (roles == 0 || roles > ORCHESTRATOR | VALIDATOR) revert NodeRegistryInvalidRoles(roles);
    }

    function _setBonded(address node, uint96 bonded) private {
        Node storage self = _nodes[node];
        uint48 next = (currentEpoch() + 1).toUint48();
        if (self.since != next) (self.bondedBefore, self.since) = (self.bonded, next);
        self.bonded = bonded;
        _refreshSeats(node);
    }

    function _refreshSeats(address node) private {
        uint256 bonded = _nodes[node].bonded;
        uint48 weight = bonded < minimumStake ? 0 : (bonded / WEIGHT_UNIT).toUint48();
        _refreshSeat(ORCHESTRATOR, node, weight);
        _refreshSeat(VALIDATOR, node, weight);
    }

    function _refreshSeat(uint8 role, address node, uint48 weight) private {
        if (_nodes[node].roles & role == 0) weight = 0;
        Seats.Book storage book = _books[role];
        bool held = book.seatOf[node] != 0;
        uint48 epoch = (currentEpoch() + 1).toUint48();
        (bool seated, address displaced) = book.assign(node, weight, epoch);
        if (displaced != address(0)) emit SeatChanged(role, displaced, 0, epoch);
        if (held || seated) emit SeatChanged(role, node, weight, epoch);
    }
}
