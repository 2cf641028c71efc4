-- The data of the paper's stages at 512 pixels: `paper` without DiffusionDB, and of CC12M what has 512 pixels and more.
SELECT source, shard, row FROM samples
WHERE status = 'ok'
  AND source IN ('sa1b', 'cc12m', 'textcaps', 'journeydb')
  AND least(width, height) >= 256
  AND (source != 'cc12m' OR least(width, height) >= 512)
