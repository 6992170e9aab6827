import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.net.URI;
import java.net.URISyntaxException;
import java.nio.file.Files;
import java.nio.file.attribute.PosixFilePermissions;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.DelegateToFileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.hadoop.fs.RawLocalFileSystem;
import org.apache.hadoop.fs.permission.FsPermission;
import org.apache.hadoop.yarn.conf.YarnConfiguration;
import org.apache.hadoop.yarn.server.MiniYARNCluster;

/** A real ResourceManager and two NodeManagers in this process; their containers are processes of their own. */
public class SmallYarn {
  /** The local files. Hadoop's own class starts `chmod` for each of the thousands of an archive that a node unpacks. */
  public static class LocalFiles extends DelegateToFileSystem {
    public LocalFiles(URI uri, Configuration settings) throws IOException, URISyntaxException {
      super(uri, new Raw(), settings, "file", false);
    }
  }

  private static class Raw extends RawLocalFileSystem {
    @Override
    public void setPermission(Path path, FsPermission permission) throws IOException {
      String nine = permission.toString().substring(0, 9).replace('t', 'x').replace('T', '-');
      Files.setPosixFilePermissions(pathToFile(path).toPath(), PosixFilePermissions.fromString(nine));
    }
  }

  /** Starts them, writes the clients' configuration into the folder args[0], says "ready", and waits for a signal. */
  public static void main(String[] args) throws Exception {
    Thread.currentThread().setContextClassLoader(LocalFiles.class.getClassLoader()); // for what core-site.xml names
    File folder = new File(args[0]);
    YarnConfiguration settings = new YarnConfiguration();
    settings.set("yarn.minicluster.yarn.nodemanager.resource.memory-mb", "4096");
    settings.set("yarn.scheduler.minimum-allocation-mb", "256");
    settings.set("yarn.nodemanager.vmem-check-enabled", "false");
    settings.set("yarn.nodemanager.disk-health-checker.enable", "false");
    // Once, it checks nevertheless.
    settings.set("yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage", "100");
    settings.set("yarn.log-aggregation-enable", "true");
    settings.set("yarn.nodemanager.remote-app-log-dir", new File(folder, "logs").toURI().toString());
    settings.set("yarn.resourcemanager.nodemanagers.heartbeat-interval-ms", "100"); // a second is ten such on a cluster
    // Each container's JVM lives for seconds, so a second compilation of code and parallel collection do not pay.
    settings.set("yarn.nodemanager.admin-env", "JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC");
    MiniYARNCluster cluster = new MiniYARNCluster("small", 2, 1, 1);
    cluster.init(settings);
    cluster.start();
    Runtime.getRuntime().addShutdownHook(new Thread(cluster::stop));
    Configuration clients = new Configuration(cluster.getConfig());
    clients.unset("fs.AbstractFileSystem.file.impl"); // which they do not have
    try (OutputStream out = new FileOutputStream(new File(folder, "yarn-site.xml"))) {
      clients.writeXml(out);
    }
    Files.copy(new File(folder, "yarn-site.xml").toPath(), new File(folder, "core-site.xml").toPath());
    System.out.println("ready");
    Thread.sleep(Long.MAX_VALUE);
  }
}
