"""The instance process: both ends of live migrations, over links between instances."""
