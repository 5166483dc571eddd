"""What a run says about itself: JSON, JUnit, summary, model card, gate."""
