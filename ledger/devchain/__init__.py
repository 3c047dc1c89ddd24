"""The embedded chain: py-evm blocks in one SQLite file, behind JSON-RPC on loopback.

A development chain with a single authority, never for real value. It runs as a process of its
own (`meshd chain dev`); daemons of a local swarm share it by its URL. The rules are those of the
Prague upgrade. `store` is the file, `execution` the EVM, `pool` what waits, `chain` puts them
together, `methods` and the modules it names are the RPC, `service` runs it all.

    ``from meshd.ledger.devchain.service import serve``
"""
