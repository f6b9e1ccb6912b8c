"""The test battery; its folders mirror the package."""
