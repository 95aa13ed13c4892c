"""A scheme for each module within a budget of bits."""

from calipers.planning.plan import Choice, SchemePlan, plan_schemes

__all__ = ["Choice", "SchemePlan", "plan_schemes"]
