"""The planner: what a strategy will need and cost before it runs, and which one to use."""
