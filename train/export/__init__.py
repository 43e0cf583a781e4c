"""A run's backbone under other libraries' names."""
