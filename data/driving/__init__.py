"""The driving world: a procedural city recorded as nuScenes records one, with Occ3D labels made as Occ3D's are.

    python -m data.driving --out DIR --seed 0                  # mini: its ten scenes' names, 20 keyframes each
    python -m data.driving --out DIR --seed 0 --size demo      # 45 training and 10 validation scenes of 3 keyframes
    python -m data.driving --out DIR --format semantickitti    # the same city as KITTI's car records it: other module
    python -m data.driving --out DIR --size questions --sweeps 0   # 150 and 40 scenes of 12 keyframes, see SHOWN

    python -m data.driving --out DIR --decoys                  # with things that share words with rare kinds

What is written: all thirteen v1.0 tables (the unmodified nuscenes-devkit loads them), six cameras as JPEG, LIDAR_TOP
keyframes and sweeps, lidarseg, map masks, gts/ (Occ3D's form), questions/ (NuScenes-QA's form), and exact/: depth,
semantics and instances of every keyframe image (0 m and class 17: nothing within 250 m), full solids, world.json.

DECOYS    Off unless asked for: without them a world keeps every byte. With them, cherry pickers (trucks with an arm),
          roll-off containers (large, long, without windows; debris) and bollards (small, pointed, some orange; pushable
          objects) stand at the kerbs: what an open-vocabulary method calls "a large vehicle with an arm" need then be
          no construction vehicle. They are annotated as nuScenes would.

SENSORS   Keyframes at 2 Hz; a LIDAR_TOP timestamp is its sample's. Cameras trigger up to 43 ms before it, in the real
          order. Every sample_data has the ego pose of its own time; images show agents *and* ego at the camera's own
          time. A LiDAR sweep is cast with everything at its timestamp (nuScenes' sweeps are motion-compensated).
          `sweeps` LiDAR sweeps lie evenly between two keyframes (2: every 167 ms); `camera_sweeps` 2 adds an image of
          each camera 83 ms before and one 83 ms after each keyframe's.
          An image is the 1600x900 camera's scaled by width / 1600; rows that the given height lacks are cropped evenly
          above and below (400x224: half a row of 400x225 at either end), so fx = fy and cy shifts.
          LiDAR: 32 rings from -30.67 to 10.67 degrees (ring 0 lowest), 1086 azimuths, to 100 m, 1 cm range noise (cut
          at 3 cm), dropped returns (more when wet or far). No radar; the car does not see itself. The ego body pitches
          and rolls by a fraction of a degree.

LABELS    gts: a voxel is occupied if the keyframe's world (at its LiDAR time) has a surface in it that some sensor saw
          at some time of the scene; everything else is 17.
          * Surfaces are sampled every 0.2 m or closer, edges included, and every sample marks its voxel: overlap, not
            centre. The voxels of the keyframe's own LiDAR returns, and of its own camera hits on things that never
            move, are added, so that every return lies in an occupied voxel (tolerance zero).
          * Saw: the surface's point in that voxel, carried through global (a mover's: through its own frame) to any
            keyframe of the scene, lies in a voxel that this keyframe's mask_camera or mask_lidar marks.
          * A voxel with several classes takes the last of: ground, background, annotated things, moving things.
          mask_lidar: the voxels on the segments from the LiDAR to each return of the keyframe's own .pcd.bin, the
          returns' own included. Rays without a return see nothing, as in a real sweep.
          mask_camera: per camera one ray through every second pixel centre (pixels 0, 2, 4, ... of both axes) from the
          camera's own pose at its own time, brought through global into the reference ego, to the depth that
          exact/depth holds (1/256 m), or out of the grid where it holds none: the voxels on it and its end's.
          So both masks can be recomputed from the files alone. Ties on faces: common.geometry's rule (float64; a voxel
          counts if the ray spends a positive length in it; what runs within a face belongs to the voxel above).

SHOWN     --size questions is made for claims about what a network reads off images. It differs from the others in what
          decides a plan and in what is parked; the renderer, sensors and labels are the same.
          * Ego's wanted speed is the neighbourhood's (residential 6 m/s to avenue 10.5) plus 1.5 m/s for each further
            lane, give or take 6 %; other traffic wants 70 to 105 % of it. Elsewhere both are drawn freely.
          * Ego's manoeuvre comes 0.8 s after the scene's begin to 0.7 s before its end, so that it falls into the 3 s
            that are scored. At 60 % of ego's junctions with lights, the light changes during the scene.
          * Vehicles of every class drive, or wait in their lane, about as often as they park: bays are emptier, and
            construction vehicles, trailers and cycles are part of the traffic. Half of the people stand or sit.
"""

from data.driving.world import make_world

__all__ = ["make_world"]