"""The rollout: problems in, sampled answers with the sampler's log-probabilities out."""
