"""Everything on the wire: messages, codec, identity, the Network port and its adapters."""
