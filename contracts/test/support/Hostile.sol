// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @notice A token that keeps one percent of every transfer between accounts.
contract FeeToken is ERC20("Fee", "FEE") {
    constructor() {
        _mint(msg.sender, 1e27);
    }

    function burn(uint256 amount) external {
        _burn(msg.sender, amount);
    }

    function _update(address from, address to, uint256 amount) internal override {
        if (from == address(0) || to == address(0)) return super._update(from, to, amount);
        super._update(from, to, amount - amount / 100);
        super._update(from, address(0), amount / 100);
    }
}

/// @notice A token that calls a target back in the middle of every transfer.
contract ReentrantToken is ERC20("Reentrant", "RE") {
    address private target;
    bytes private data;
    /// @notice The selector that the call back reverted with; zero if it went through.
    bytes4 public refusal;
    uint256 public calls;

    constructor() {
        _mint(msg.sender, 1e27);
    }

    function burn(uint256 amount) external {
        _burn(msg.sender, amount);
    }

    function aim(address target_, bytes calldata data_) external {
        (target, data) = (target_, data_);
    }

    function _update(address from, address to, uint256 amount) internal override {
        super._update(from, to, amount);
        if (target == address(0)) return;
        ++calls;
        (bool done, bytes memory result) = target.call(data);
        refusal = done ? bytes4(0) : bytes4(result);
    }
}
