"""What people look at: a run's page, and the curves of several runs in one figure."""
