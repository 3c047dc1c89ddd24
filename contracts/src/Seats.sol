// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Checkpoints} from "@openzeppelin/contracts/utils/structs/Checkpoints.sol";

/**
 * @title Seats, a bounded list of weighted members with its whole history
 * @notice At most {MAX} seats, so that reading all of them is bounded. Who held a seat, and with what
 * weight, stays readable for every past epoch: a draw for an earlier block is the same whenever it is
 * made, whatever happened since. When all seats are taken a newcomer replaces the weakest member if
 * it is strictly heavier, so the list cannot be blocked by filling it with small stakes.
 */
library Seats {
    using Checkpoints for Checkpoints.Trace208;

    /// @notice The largest number of seats: a draw reads two storage words for each of them.
    uint256 internal constant MAX = 256;

    struct Book {
        /// Seats ever used, at most {MAX}; the first `count` indices of `history`.
        uint256 count;
        /// Indices below `count` that nobody holds from the next epoch on.
        uint16[] free;
        /// Seat index to its checkpoints: key epoch, value holder (160 bits) and weight (48 bits).
        mapping(uint256 index => Checkpoints.Trace208) history;
        /// Member to its seat index plus one; zero means no seat.
        mapping(address member => uint256) seatOf;
    }

    /**
     * @notice Gives `member` the weight from `epoch` on; zero leaves the seat.
     * @return seated Whether the member holds a seat from `epoch` on.
     * @return displaced The member that lost its seat to this one, or zero.
     */
    function assign(Book storage book, address member, uint48 weight, uint48 epoch)
        internal
        returns (bool seated, address displaced)
    {
        uint256 seat = book.seatOf[member];
        if (weight == 0) {
            if (seat != 0) {
                delete book.seatOf[member];
                book.free.push(uint16(seat - 1));
                book.history[seat - 1].push(epoch, 0);
            }
            return (false, address(0));
        }
        if (seat == 0) {
            (seat, displaced) = _take(book, weight);
            if (seat == 0) return (false, address(0));
            book.seatOf[member] = seat;
        }
        book.history[seat - 1].push(epoch, (uint208(uint160(member)) << 48) | weight);
        return (true, displaced);
    }

    /// @notice The members of `epoch` in the order of their seats, with their weights.
    function heldIn(Book storage book, uint48 epoch)
        internal
        view
        returns (address[] memory members, uint256[] memory weights)
    {
        uint256 count = book.count;
        members = new address[](count);
        weights = new uint256[](count);
        uint256 found;
        for (uint256 index; index < count; ++index) {
            (, uint48 since, uint208 value) = book.history[index].latestCheckpoint();
            if (since > epoch) value = book.history[index].upperLookupRecent(epoch);
            if (value == 0) continue;
            members[found] = address(uint160(value >> 48));
            weights[found] = uint48(value);
            ++found;
        }
        assembly ("memory-safe") {
            mstore(members, found)
            mstore(weights, found)
        }
    }

    /// @dev A free seat, a new one, or the weakest member's if it is strictly lighter; as index plus one.
    function _take(Book storage book, uint48 weight) private returns (uint256 seat, address displaced) {
        uint256 available = book.free.length;
        if (available != 0) {
            seat = uint256(book.free[available - 1]) + 1;
            book.free.pop();
            return (seat, address(0));
        }
        if (book.count < MAX) return (++book.count, address(0));
        uint208 weakest = weight;
        for (uint256 index; index < MAX; ++index) {
            uint208 value = book.history[index].latest();
            if (uint48(value) < uint48(weakest)) (seat, weakest) = (index + 1, value);
        }
        if (seat != 0) {
            displaced = address(uint160(weakest >> 48));
            delete book.seatOf[displaced];
        }
    }
}
