"""What a cluster and an AWS account need before Trainyard runs there: rendered, never applied."""
