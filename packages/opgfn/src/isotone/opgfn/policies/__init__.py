"""The networks: what they return, and those for rows of categories."""

from isotone.opgfn.policies.base import Policy, PolicyOutput
from isotone.opgfn.policies.graph import GraphPolicy
from isotone.opgfn.policies.mlp import MLPPolicy, SetPolicy

__all__ = ["GraphPolicy", "MLPPolicy", "Policy", "PolicyOutput", "SetPolicy"]
