"""The Network port over py-libp2p: the only package that imports it."""

import warnings

with warnings.catch_warnings():
    # py-libp2p imports the deprecated websockets.legacy, also where no WebSocket is used.
    warnings.simplefilter("ignore", DeprecationWarning)
    from meshd.p2p.libp2p.adapter import Libp2pNetwork, open_network
    from meshd.p2p.libp2p.host import ListenError, NetworkSettings

__all__ = ["Libp2pNetwork", "ListenError", "NetworkSettings", "open_network"]
