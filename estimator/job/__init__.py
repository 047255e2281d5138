"""The door: user input becomes a validated ``Job``."""

from estimator.job.cluster import Cluster, Gpu, Host
from estimator.job.hf import load_config, spec_from_config
from estimator.job.job import Job
from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy
from estimator.job.workload import Workload

__all__ = ["Cluster", "Gpu", "Host", "Job", "ModelSpec", "Strategy", "Workload", "load_config", "spec_from_config"]
