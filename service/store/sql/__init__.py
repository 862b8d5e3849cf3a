"""The only database: predictions, readings and truths, and what joins them. Nothing else in the project speaks SQL."""
