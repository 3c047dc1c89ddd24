// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Burnable} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Burnable.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";

/**
 * @title MCC, the credit that jobs are paid in
 * @notice A plain ERC-20 with Permit and Burnable. The whole supply exists from the constructor on;
 * nobody owns the contract, nobody can mint, pause or take.
 */
contract MCC is ERC20, ERC20Burnable, ERC20Permit {
    /// @notice Every unit there will ever be: one billion MCC of 18 decimals. Burning lowers it.
    uint256 public constant INITIAL_SUPPLY = 1_000_000_000e18;

    /// @param holder The account that receives the whole supply.
    constructor(address holder) ERC20("Mesh Compute Credit", "MCC") ERC20Permit("Mesh Compute Credit") {
        _mint(holder, INITIAL_SUPPLY);
    }
}
