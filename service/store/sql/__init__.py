"""The database: predictions, readings and labels, and how they are joined. Only this package contains SQL."""
