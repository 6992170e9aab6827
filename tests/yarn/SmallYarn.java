import java.io.File;
import java.io.FileOutputStream;
import java.io.FileWriter;
import java.io.OutputStream;
import java.io.Writer;
import org.apache.hadoop.yarn.conf.YarnConfiguration;
import org.apache.hadoop.yarn.server.MiniYARNCluster;

/** A real ResourceManager and two NodeManagers in this process; their containers are processes of their own. */
public class SmallYarn {
  /** Starts them, writes the clients' configuration into the folder args[0], says "ready", and waits for a signal. */
  public static void main(String[] args) throws Exception {
    File folder = new File(args[0]);
    YarnConfiguration settings = new YarnConfiguration();
    settings.set("fs.defaultFS", "file:///");
    settings.set("yarn.minicluster.yarn.nodemanager.resource.memory-mb", "4096");
    settings.set("yarn.scheduler.minimum-allocation-mb", "256");
    settings.set("yarn.nodemanager.vmem-check-enabled", "false");
    settings.set("yarn.nodemanager.disk-health-checker.enable", "false");
    settings.set("yarn.log-aggregation-enable", "true");
    settings.set("yarn.nodemanager.remote-app-log-dir", new File(folder, "logs").getPath());
    // Each container's JVM lives for seconds, so a second compilation of code and parallel collection do not pay.
    settings.set("yarn.nodemanager.admin-env", "JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC");
    MiniYARNCluster cluster = new MiniYARNCluster("small", 2, 1, 1);
    cluster.init(settings);
    cluster.start();
    Runtime.getRuntime().addShutdownHook(new Thread(cluster::stop));
    try (OutputStream out = new FileOutputStream(new File(folder, "yarn-site.xml"))) {
      cluster.getConfig().writeXml(out);
    }
    try (Writer out = new FileWriter(new File(folder, "core-site.xml"))) {
      out.write("<configuration><property><name>fs.defaultFS</name><value>file:///</value></property></configuration>");
    }
    System.out.println("ready");
    Thread.sleep(Long.MAX_VALUE);
  }
}
