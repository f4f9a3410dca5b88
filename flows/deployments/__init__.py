"""What `r1 deploy` leaves in Prefect: deployments, work pools, the flow that a worker calls."""
