"""How a job of any kind splits into shards."""

from __future__ import annotations

from typing import TypeAlias

from meshd.ledger.rounds import TRAIN
from meshd.node.workloads.datasets import Manifest
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.infer import InferPlan
from meshd.node.workloads.program import Program
from meshd.node.workloads.training.plan import TrainPlan
from meshd.p2p.messages import JobTerms

Plan: TypeAlias = InferPlan | TrainPlan


def make_plan(terms: JobTerms, program: Program, manifest: Manifest) -> Plan:
    """Return the plan of a job; raises WorkloadError if its terms contradict program or data."""
    if terms.workload == "infer":
        return InferPlan(terms, program, manifest)
    if terms.workload == TRAIN:
        return TrainPlan(terms, program, manifest)
    raise WorkloadError(f"workload {terms.workload!r} is not known: upgrade meshd")
