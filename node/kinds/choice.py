"""Which kind a job is of."""

from __future__ import annotations

from meshd.node.kinds.infer import InferKind
from meshd.node.kinds.kind import JobContext, Kind
from meshd.node.kinds.train import TrainKind
from meshd.node.workloads.infer import InferPlan


def kind_of(context: JobContext) -> Kind:
    """Return what the shards of this job are computed and checked by."""
    if isinstance(context.plan, InferPlan):
        return InferKind(context, context.plan)
    return TrainKind(context, context.plan)
