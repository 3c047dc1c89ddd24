// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {MCC} from "../src/MCC.sol";
import {Assert} from "./support/Assert.sol";
import {Deploy} from "./support/Deploy.sol";
import {vm} from "./support/Vm.sol";

contract MCCTest is Assert {
    MCC private mcc;
    address private holder = vm.addr(1);
    address private spender = vm.addr(2);

    function setUp() public {
        mcc = Deploy.mcc(holder);
    }

    function test_theWholeSupplyIsTheHoldersFromTheStart() public view {
        assertEq(mcc.totalSupply(), 1_000_000_000e18, "supply");
        assertEq(mcc.balanceOf(holder), mcc.totalSupply(), "holder");
        assertEq(mcc.balanceOf(address(this)), 0, "deployer");
        assertEq(mcc.decimals(), 18, "decimals");
    }

    function test_burningLowersTheSupply() public {
        vm.prank(holder);
        mcc.burn(7);
        assertEq(mcc.totalSupply(), mcc.INITIAL_SUPPLY() - 7, "supply");
    }

    function test_aPermitIsAnAllowanceAndWorksOnce() public {
        bytes32 typeHash =
            keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)");
        uint256 deadline = vm.getBlockTimestamp();
        bytes32 inner = keccak256(abi.encode(typeHash, holder, spender, 5, 0, deadline));
        (uint8 v, bytes32 r, bytes32 s) =
            vm.sign(1, keccak256(abi.encodePacked("\x19\x01", mcc.DOMAIN_SEPARATOR(), inner)));
        mcc.permit(holder, spender, 5, deadline, v, r, s);
        assertEq(mcc.allowance(holder, spender), 5, "allowance");
        vm.expectPartialRevert(bytes4(keccak256("ERC2612InvalidSigner(address,address)")));
        mcc.permit(holder, spender, 5, deadline, v, r, s);
    }
}
