//! The server's machine loses its power: what was not synced is gone, what was acknowledged is not.

use std::{fs, time::Duration};

use tokio::time::sleep;

use crate::{
    faults::{LINGER, long_or},
    harness::{Life, Lines, MortalDisk, Random, Site, eventually, skipped},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_disk_forgets_what_was_not_synced_has_acknowledged_none_of_it() {
    let mut site = Site::new();
    let mount = site.scene.path("disk");
    let Some(mut disk) = MortalDisk::new(site.scene.dir(), &mount) else {
        return skipped("an ext4 file system cannot be made or mounted here");
    };
    site.data = mount.join("data");
    Lines::prepare(&site.scene, 60_000);
    let mut agent = site.agent(&LINGER, Lines::UNTIL_ENOUGH);
    let mut random = Random::new(long_or(1, u64::from(std::process::id())));
    let mut lives = Vec::new();
    for round in 0..long_or(10, 100) {
        let before = site.stored(1);
        let collector = site.started().await;
        if round % 3 != 0 {
            eventually("it stores something", || site.stored(1) > before).await;
        }
        sleep(Duration::from_millis(random.within(0..300))).await; // any moment
        lives.push(Life::cut_short(collector).await);
        fs::write(mount.join("unsynced"), "forgotten").unwrap(); // now, for a server syncs the whole file system
        disk.crash();
        let left = fs::read(mount.join("unsynced")).unwrap_or_default();
        assert!(left.is_empty(), "the disk does not forget");
        fs::remove_file(mount.join("unsynced")).unwrap_or(());
    }
    site.scene.write("enough", "");
    lives.extend(site.serve(|_| site.start(&[], "")).await);
    site.agent_ended(&mut agent, &lives).await;
    site.assert_whole(1, &Lines::written(&site.scene), 7, &lives);
}
