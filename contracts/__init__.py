"""Solidity sources, their tests, and the built ABI and bytecode."""
