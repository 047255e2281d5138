"""Any ``torch.nn.Module`` as a model that can be forecast: it is run once without data."""

from runtime.tracing.trace import trace as trace
