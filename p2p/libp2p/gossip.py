"""GossipSub with every parameter set, messages checked before they are passed on.

py-libp2p's defaults would silence a swarm: ten messages a second and topic, a heartbeat every
120 s, 32 queued messages a peer, all scores zero, and an "adaptive" mode that slows the
heartbeat to 30 s when it counts few peers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio
from libp2p.abc import IHost
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.score import ScoreParams, TopicScoreParams
from libp2p.tools.anyio_service import background_trio_service

from meshd.p2p.codec import CodecError, Signed
from meshd.p2p.libp2p.host import NetworkSettings
from meshd.p2p.libp2p.streams import StreamFailure, library_errors
from meshd.p2p.limits import MAX_GOSSIP, check_gossip
from meshd.p2p.messages import MIB, Message
from meshd.p2p.services import Turns

PROTOCOLS = [TProtocol("/meshsub/1.1.0")]
QUEUE_SIZE = 1024
"""Messages that wait for one slow peer."""
SEEN_S = 120
"""Seconds for which a message is recognised when it comes again."""

Check = Callable[[str, bytes], Signed[Message]]
"""Opens what came on a topic; raises CodecError."""
Deliver = Callable[[str, Signed[Message]], None]


def _score_params() -> ScoreParams:
    """Invalid messages and spam cost; all is forgotten within a minute of good behaviour."""
    return ScoreParams(
        p1_time_in_mesh=TopicScoreParams(weight=0.0),
        p2_first_message_deliveries=TopicScoreParams(weight=0.5, cap=20.0, decay=0.9),
        p3_mesh_message_deliveries=TopicScoreParams(weight=0.0),
        p4_invalid_messages=TopicScoreParams(weight=2.0, cap=100.0, decay=0.95),
        p5_behavior_penalty_weight=1.0,
        p5_behavior_penalty_decay=0.9,
        p5_behavior_penalty_threshold=10.0,
        p7_ip_colocation_weight=0.0,  # a household shares one address
        gossip_threshold=-20.0,
        publish_threshold=-40.0,
        graylist_threshold=-80.0,
        accept_px_threshold=0.0,
    )


class _Router(GossipSub):
    """GossipSub that sends its own messages to every subscriber it is connected to."""

    def __init__(self, settings: NetworkSettings, stats: Counter[str]) -> None:
        super().__init__(
            protocols=PROTOCOLS,
            degree=4,  # small: authors send to all subscribers anyway, the mesh fills gaps
            degree_low=3,
            degree_high=8,
            gossip_window=3,
            gossip_history=5,
            heartbeat_initial_delay=0.1,
            heartbeat_interval=1,
            do_px=False,
            prune_back_off=10,
            unsubscribe_back_off=2,
            score_params=_score_params(),
            adaptive_gossip_enabled=False,
            spam_protection_enabled=True,
            max_messages_per_topic_per_second=settings.gossip_rate,
            eclipse_protection_enabled=not settings.lan,
            max_pending_messages_per_peer=64,
            pending_messages_ttl=5.0,
        )
        self._stats = stats

    def _get_peers_to_send(
        self,
        topic_ids: Iterable[str],
        msg_forwarder: ID,
        origin: ID,
        msg_id: bytes | None = None,
    ) -> Iterable[ID]:
        """Pass others' messages to the mesh, own ones to all subscribers (flood publishing)."""
        pubsub = self.pubsub
        if pubsub is None or msg_forwarder != pubsub.my_id:
            yield from super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id)
            return
        for topic in topic_ids:
            yield from pubsub.peer_topics.get(topic, set()) - {origin}

    def send_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC, priority: bool = False) -> None:
        """Send without the signed address record, which peers would verify every time."""
        bare = rpc_pb2.RPC()
        bare.CopyFrom(rpc)
        bare.ClearField("senderRecord")
        super().send_rpc(peer_id, bare, priority)

    def _check_spam_protection(self, peer_id: ID, msg: rpc_pb2.Message) -> bool:
        if self.pubsub is not None and peer_id == self.pubsub.my_id:
            return True
        admitted = super()._check_spam_protection(peer_id, msg)
        self._stats["gossip over rate"] += not admitted
        return admitted


class _Pubsub(Pubsub):
    """Pubsub that hands messages straight to meshd's subscriptions, with longer queues."""

    def __init__(self, host: IHost, router: _Router, deliver: Callable[[str, bytes], None]) -> None:
        super().__init__(
            host,
            router,
            seen_ttl=SEEN_S,
            sweep_interval=30,
            strict_signing=True,  # else a forged sender and number would mask a real message
            max_inbound_rpc_size=MIB,
        )
        # Numbers start at the clock's microseconds, not seconds: after a restart they must not
        # repeat, or peers take new messages for ones already seen.
        self.counter = time.time_ns() // 1000
        self._deliver = deliver

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        for topic in publish_message.topicIDs:
            if topic in self.topic_ids:
                self._deliver(topic, publish_message.data)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        await super()._handle_new_peer(peer_id)
        if peer_id in self.peer_queues:
            self.peer_queues[peer_id]._queue.max_size = QUEUE_SIZE


class Gossip:
    """Publishing and subscribing for one host.

    *check* opens what arrives; what it refuses is neither delivered nor passed on.
    """

    def __init__(
        self,
        host: IHost,
        settings: NetworkSettings,
        stats: Counter[str],
        check: Check,
        deliver: Deliver,
    ) -> None:
        self._stats = stats
        self._check = check
        self._on_message = deliver
        self._router = _Router(settings, stats)
        self._pubsub = _Pubsub(host, self._router, self._deliver)
        self._users: Counter[str] = Counter()
        self._turns = Turns()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run until the context ends; peers must be disconnected by then."""
        async with background_trio_service(self._pubsub), background_trio_service(self._router):
            await self._pubsub.wait_until_ready()
            yield

    async def publish(self, topic: str, raw: bytes) -> None:
        """Send *raw* to every connected subscriber of *topic*, own subscriptions included.

        Raises ValueError for more than MAX_GOSSIP bytes, StreamFailure.
        """
        check_gossip(raw)
        with library_errors("publish"):
            await self._pubsub.publish(topic, raw)
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def joined(self, topic: str) -> AsyncIterator[None]:
        """Be subscribed to *topic* while the context is open."""
        async with self._turns.of(topic.encode()):
            self._users[topic] += 1
            if self._users[topic] == 1:
                self._pubsub.set_topic_validator(topic, self._validate, False)
                with library_errors("subscribe"):
                    await self._pubsub.subscribe(topic)
        try:
            yield
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 2, shield=True):
                await self._leave(topic)

    async def _leave(self, topic: str) -> None:
        async with self._turns.of(topic.encode()):
            self._users[topic] -= 1
            if not self._users[topic]:
                del self._users[topic]
                self._pubsub.remove_topic_validator(topic)
                try:
                    with library_errors("unsubscribe"):
                        await self._pubsub.unsubscribe(topic)
                except StreamFailure:
                    self._stats["gossip failed"] += 1

    def _validate(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Decide whether *message* is passed on.

        Not async on purpose: two copies that arrive together would both be checked, delivered
        and passed on, because the library marks a message as seen after its check.
        """
        if len(message.data) > MAX_GOSSIP or len(message.topicIDs) != 1:
            self._stats["bad frames"] += 1
            return False
        try:
            self._check(message.topicIDs[0], message.data)
        except CodecError:
            self._stats["bad frames"] += 1
            return False
        return True

    def _deliver(self, topic: str, raw: bytes) -> None:
        try:
            self._on_message(topic, self._check(topic, raw))
        except CodecError:  # it expired since its check
            self._stats["bad frames"] += 1
