"""From a model and studies with the truth to tables of metrics, beside the baselines."""
