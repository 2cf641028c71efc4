"""Sources of images: the protocol, the adapters of data sets, and the choice by the config."""
