"""The analytical model: per-GPU memory and step time of a ZeRO training step. Plain arithmetic, never torch.

``estimator.job`` is the door (user input becomes a validated ``Job``), ``estimator.predict.predict`` turns a ``Job`` into a
``StepReport``, ``estimator.plan.plan`` ranks every strategy for one model and cluster.
"""
