"""What is cancelled in the middle of a write must not cost the connection."""

from __future__ import annotations

import pytest
import trio

MOMENTS = 120
"""Steps of the event loop that a request between two nodes takes, and more."""


async def test_a_request_cancelled_at_any_moment_costs_no_connection(kit):
    alice = await kit.start(1)
    bob = await kit.start(2, [alice.multiaddr])
    await kit.eventually(lambda: bob.network.peers() and alice.network.peers())
    asked = kit.word(alice.identity)
    async with (
        alice.network.departures() as from_alice,
        bob.network.departures() as from_bob,
        bob.network.serve(type(asked.message), kit.echo),
    ):
        for moment in range(MOMENTS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(alice.network.request, bob.address, asked)
                for _ in range(moment):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert await alice.network.request(bob.address, asked) == asked
        for departures in (from_alice, from_bob):
            with pytest.raises(trio.WouldBlock):
                departures.receive_nowait()
