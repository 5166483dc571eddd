"""How far an exported file is from the original: metrics, runners, evaluation."""
